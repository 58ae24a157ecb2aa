"""Each kernel against its roofline, at the 9B's shapes and a batch that fills the GPU.

Bytes are those of inputs read once and outputs written once; a kernel that reads memory twice loses
efficiency. T tokens, H heads, P head dimension, G groups, N state size, C channels, E hidden size, F FFN
size, V vocabulary, Q chunk length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from bench import INPUT_SETS, Bench, milliseconds

from nanohybrid.ops.attention import PagedCache
from nanohybrid.ops.attention.triton import decode_attention
from nanohybrid.ops.causal_conv import triton as conv
from nanohybrid.ops.causal_conv.backward import causal_conv_backward
from nanohybrid.ops.fp8 import product_kernel, products
from nanohybrid.ops.fp8.quantize_kernels import quantize_blocks, quantize_tiles
from nanohybrid.ops.gated_norm import triton as gated
from nanohybrid.ops.gated_norm.backward import gated_norm_backward, rms_norm_backward
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.losses import kernels as losses
from nanohybrid.ops.residual_norm import triton as residual
from nanohybrid.ops.squared_relu import triton as relu
from nanohybrid.ops.ssd_scan import torch as torch_form
from nanohybrid.ops.ssd_scan import triton as scan
from nanohybrid.ops.ssd_scan.backward import ssd_scan_backward
from nanohybrid.ops.ssd_scan.inputs import SSDInputs

TITLE = "Milliseconds of each kernel, its roofline, and the roofline as a fraction of the time."
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    T: int = 8192
    H: int = 128
    P: int = 80
    G: int = 8
    N: int = 128
    E: int = 4480
    F: int = 15680
    V: int = 131_072
    rows: int = 256  # of logits
    context: int = 16_384
    batch: int = 16
    Q: int = 128


TOY = Sizes(T=140, H=2, P=12, G=1, N=16, E=64, F=96, V=100, rows=4, context=40, batch=2)


@dataclass(frozen=True)
class Work:
    name: str
    call: Callable[[], Callable[[], object]]  # makes a set of inputs, and returns the call on it
    bytes: float
    operations: float = 0.0
    fp8: bool = False


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    torch.manual_seed(0)
    sizes = TOY if bench.toy else Sizes()
    for work in [*_scans(sizes), *_mixers(sizes), *_head(sizes), *_products(sizes), *_decode(sizes)]:
        with torch.device(bench.device):
            try:
                found = milliseconds([work.call() for _ in range(INPUT_SETS)], bench.device)
            except Exception as error:  # noqa: BLE001  torch may lack a product; the other kernels are still measured
                emit(
                    {
                        "kernel": work.name,
                        "problem": f"{type(error).__name__}: {str(error)[:120]}".replace("\n", " "),
                    }
                )
                continue
        roofline, bound = bench.roofline(work.bytes, work.operations, work.fp8)
        row = {
            "kernel": work.name,
            "ms": found[0],
            "min_ms": found[1],
            "max_ms": found[2],
            "roofline_ms": roofline,
            "bound": bound,
        }
        emit(
            row
            | {
                "fraction": roofline / found[0],
                "GB/s": work.bytes / found[0] / 1e6,
                "TFLOP/s": work.operations / found[0] / 1e9,
            }
        )


def _scans(s: Sizes) -> Iterator[Work]:
    layout = Layout.packed([s.T // 2, s.T - s.T // 2])
    narrow, wide = 2 * s.T * (s.H * s.P + 2 * s.G * s.N), 4 * s.T * (s.H * s.P + s.H)
    inside, state = (
        s.T * s.Q * s.H * s.P,
        2 * s.T * s.H * s.P * s.N,
    )  # half of a Q x Q product per head, 2 operations for each pair
    scores = s.T * s.Q * s.G * s.N

    def inputs() -> SSDInputs:
        x, B, C = torch.randn(s.T, s.H, s.P), torch.randn(s.T, s.G, s.N), torch.randn(s.T, s.G, s.N)
        dt, A = torch.rand(s.T, s.H) * 0.1, -torch.rand(s.H) * 8
        return SSDInputs(x.to(BF16), dt, A, B.to(BF16), C.to(BF16), torch.randn(s.H))

    def forward(form: Callable[..., object]) -> Callable[[], object]:
        return partial(torch.no_grad()(form), inputs(), layout, False)

    def backward() -> Callable[[], object]:
        return partial(ssd_scan_backward, torch.randn(s.T, s.H, s.P), None, inputs(), layout)

    yield Work("SSD scan", partial(forward, scan.ssd_scan), narrow + wide, scores + inside + 2 * state)
    yield Work(
        "SSD scan in torch", partial(forward, torch_form.ssd_scan), narrow + wide, scores + inside + 2 * state
    )
    yield Work(
        "gradient of the SSD scan",
        backward,
        2 * narrow + wide + 4 * s.T * s.H,
        4 * scores + 2 * inside + 6 * state,
    )


def _mixers(s: Sizes) -> Iterator[Work]:
    layout, C, D = Layout.packed([s.T]), s.H * s.P + 2 * s.G * s.N, s.H * s.P

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(BF16)

    def convolved() -> Callable[[], object]:
        return partial(conv.conv_silu, random(s.T, C), torch.randn(C, 4), torch.randn(C), layout, None, False)

    def convolved_back() -> Callable[[], object]:
        return partial(
            causal_conv_backward,
            random(s.T, C),
            random(s.T, C),
            torch.randn(C, 4),
            torch.randn(C),
            layout,
            True,
        )

    def normed() -> Callable[[], object]:
        return partial(gated.gated_norm, torch.randn(s.T, D), random(s.T, D), torch.randn(D), s.G, 1e-5)

    def normed_back() -> Callable[[], object]:
        return partial(
            gated_norm_backward,
            random(s.T, D),
            torch.randn(s.T, D),
            random(s.T, D),
            torch.randn(D),
            s.G,
            1e-5,
        )

    def added() -> Callable[[], object]:
        return partial(residual.residual_norm, random(s.T, s.E), random(s.T, s.E), torch.randn(s.E), 1e-5)

    def added_back() -> Callable[[], object]:
        return partial(
            rms_norm_backward, random(s.T, s.E), random(s.T, s.E), torch.randn(s.E), 1e-5, random(s.T, s.E)
        )

    def squared() -> Callable[[], object]:
        return partial(torch.no_grad()(relu.squared_relu), random(s.T, s.F))

    yield Work("conv and SiLU", convolved, 4 * s.T * C)
    yield Work("gradient of conv and SiLU", convolved_back, 6 * s.T * C)
    yield Work("gated norm", normed, 8 * s.T * D)
    yield Work("gradient of the gated norm", normed_back, 14 * s.T * D)
    yield Work("residual and RMSNorm", added, 8 * s.T * s.E)
    yield Work("gradient of residual and RMSNorm", added_back, 8 * s.T * s.E)
    yield Work("squared ReLU", squared, 4 * s.T * s.F)


def _head(s: Sizes) -> Iterator[Work]:
    def logits() -> torch.Tensor:
        return torch.randn(s.rows, s.V).to(BF16)

    def cross_entropy() -> Callable[[], object]:
        return partial(losses.cross_entropy, logits(), torch.randint(s.V, (s.rows,)), True)

    def forward_kl() -> Callable[[], object]:
        return partial(losses.forward_kl, logits(), logits(), 1.0, True)

    yield Work("cross-entropy, loss and gradient", cross_entropy, 4 * s.rows * s.V)
    yield Work("forward KL, loss and gradient", forward_kl, 6 * s.rows * s.V)


def _products(s: Sizes) -> Iterator[Work]:
    def quantized() -> Callable[[], object]:
        return partial(quantize_tiles, torch.randn(s.T, s.E).to(BF16))

    def weight() -> Callable[[], object]:
        return partial(quantize_blocks, torch.randn(s.F, s.E))

    def product(form: Callable[..., object], square: bool) -> Callable[[], object]:
        a, b = quantize_tiles(torch.randn(s.T, s.E), columns=False)[0], torch.randn(s.F, s.E)
        return partial(
            form, a, quantize_blocks(b)[0] if square else quantize_tiles(b, columns=False)[0], BF16
        )

    yield Work("FP8 tiles along both axes", quantized, 4 * s.T * s.E)
    yield Work("FP8 blocks of a weight and its transpose", weight, 6 * s.F * s.E)
    moved, operations = s.T * s.E + s.F * s.E + 2 * s.T * s.F, 2 * s.T * s.E * s.F
    yield Work(
        "FP8 product, tiles by blocks",
        partial(product, product_kernel.product, True),
        moved,
        operations,
        True,
    )
    yield Work(
        "FP8 product by torch, tiles by blocks",
        partial(product, products.torch_product, True),
        moved,
        operations,
        True,
    )
    yield Work(
        "FP8 product, tiles by tiles",
        partial(product, product_kernel.product, False),
        moved,
        operations,
        True,
    )
    yield Work(
        "FP8 product by torch, tiles by tiles",
        partial(product, products.torch_product, False),
        moved,
        operations,
        True,
    )


def _decode(s: Sizes) -> Iterator[Work]:
    heads, keys, P = (40, 8, 128) if s.T > 1000 else (4, 2, 16)
    layout = Layout.contiguous([1] * s.batch, [s.context - 1] * s.batch, range(s.batch), s.context)

    def attend() -> Callable[[], object]:
        pools = torch.randn(2, s.batch * -(-s.context // layout.page_size), layout.page_size, keys, P).to(
            BF16
        )
        return partial(decode_attention, torch.randn(s.batch, heads, P).to(BF16), layout, PagedCache(*pools))

    yield Work(
        f"decode attention, {s.batch} sequences of {s.context}", attend, 4 * s.batch * s.context * keys * P
    )
