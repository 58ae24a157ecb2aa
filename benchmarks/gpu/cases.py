"""Cases that compare every kernel with its equation. The part `check` and tests/ops/test_on_gpu.py run them.

A case is a fast form, its equation in plain torch (run in float64), and inputs by name. Inputs in `narrow`
are rounded to the dtype under test. The equation gets the rounded numbers, so the error is that of the kernel
and not of its inputs' rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.attention import PagedCache
from nanohybrid.ops.attention import torch as attention_torch
from nanohybrid.ops.attention import triton as attention
from nanohybrid.ops.causal_conv import torch as conv_torch
from nanohybrid.ops.causal_conv import triton_autograd as conv
from nanohybrid.ops.fp8 import kernels as fp8
from nanohybrid.ops.fp8 import torch as fp8_torch
from nanohybrid.ops.gated_norm import torch as gated_torch
from nanohybrid.ops.gated_norm import triton_autograd as gated
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.losses import kernels as losses
from nanohybrid.ops.residual_norm import reference as residual_reference
from nanohybrid.ops.residual_norm import triton_autograd as residual
from nanohybrid.ops.rms_norm import reference as rms_reference
from nanohybrid.ops.rms_norm import triton as rms
from nanohybrid.ops.squared_relu import reference as relu_reference
from nanohybrid.ops.squared_relu import triton as relu
from nanohybrid.ops.ssd_scan import torch as scan_torch
from nanohybrid.ops.ssd_scan import triton_autograd as scan_triton
from nanohybrid.ops.ssd_scan.inputs import SSDInputs

EPS = 1e-5
Op = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """tolerance: of the norm of the difference, relative to that of the expected result, by input dtype."""

    name: str
    fast: Op
    expected: Op
    inputs: dict[str, Tensor]
    narrow: tuple[str, ...]
    tolerance: dict[torch.dtype, float]
    gradients: bool = True


FP32, BF16 = torch.float32, torch.bfloat16
PLAIN = {FP32: 1e-5, BF16: 2e-2}
SCAN = {FP32: 1e-4, BF16: 2e-2}


def errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """The relative error of each output and of each input's gradient, by name; infinity where one is NaN."""
    given = {name: t.to(dtype) if name in case.narrow else t for name, t in case.inputs.items()}
    found, expected = (
        _results(case.fast, given, case.gradients),
        _results(case.expected, {n: t.double() for n, t in given.items()}, case.gradients),
    )
    return {name: _error(found[name], value) for name, value in expected.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    error = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def _results(op: Op, given: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_(gradients) for name, t in given.items()}
    outputs = op(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not gradients:
        return found
    weights = [_weights(output) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _weights(output: Tensor) -> Tensor:
    """Random weights, the same for both forms, exact in bf16."""
    generator = torch.Generator(output.device).manual_seed(output.numel())
    return torch.randint(-8, 9, output.shape, generator=generator, device=output.device).to(output)


def cases(toy: bool) -> Iterator[Case]:
    yield from scans(toy)
    yield from convolutions(toy)
    yield from norms(toy)
    yield from heads(toy)
    yield from linears(toy)
    yield from attentions(toy)


def scans(toy: bool) -> Iterator[Case]:
    shapes = [(2, 4, 1, 4)] if toy else [(128, 80, 8, 128), (32, 64, 8, 128), (6, 60, 2, 48), (5, 16, 5, 16)]
    ragged_batches = [[3, 130]] if toy else [[1], [127, 128, 129], [1500], [3, 700, 64, 1, 257]]
    for H, P, G, N in shapes:
        for lengths in ragged_batches:
            for state in (False, True):
                T, S = sum(lengths), len(lengths)
                layout = Layout.packed(lengths)
                inputs = {
                    "x_THP": torch.randn(T, H, P),
                    "dt_TH": torch.rand(T, H) * 0.5,
                    "A_H": -torch.rand(H) * 8,
                }
                inputs |= {
                    "B_TGN": torch.randn(T, G, N) / N**0.25,
                    "C_TGN": torch.randn(T, G, N) / N**0.25,
                    "D_H": torch.randn(H),
                }
                if state:
                    inputs["initial_SHPN"] = torch.randn(S, H, P, N)
                name = f"SSD scan {H} x {P}, {G} x {N}, {lengths}" + ", states" * state
                yield Case(
                    name,
                    *(partial(_scan, form, layout, state) for form in (scan_triton, scan_torch)),
                    inputs,
                    ("x_THP", "B_TGN", "C_TGN"),
                    SCAN,
                )


def _scan(form: ModuleType, layout: Layout, states: bool, **tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """y, and the final states where `states`."""
    y, final = form.ssd_scan(SSDInputs(**tensors), layout, states)
    return (y, final) if states else y


def _conv_silu(layout: Layout, **tensors: Tensor) -> Tensor:
    return conv.conv_silu(**tensors, layout=layout, output_final_state=False)[0]


def convolutions(toy: bool) -> Iterator[Case]:
    for C, W in [(20, 4)] if toy else [(12288, 4), (257, 3), (1, 2)]:
        for lengths in [[3, 40]] if toy else [[1], [4096], [3, 1000, 16, 17, 128]]:
            layout = Layout.packed(lengths)
            inputs = {
                "x_TC": torch.randn(sum(lengths), C),
                "weight_CW": torch.randn(C, W),
                "bias_C": torch.randn(C),
            }

            def expected(layout: Layout = layout, **inputs: Tensor) -> Tensor:
                return F.silu(conv_torch.causal_conv(**inputs, layout=layout, output_final_state=False)[0])

            name, fast = f"conv and SiLU {C} x {W}, {lengths}", partial(_conv_silu, layout)
            yield Case(name, fast, expected, inputs, ("x_TC",), PLAIN)


def norms(toy: bool) -> Iterator[Case]:
    for T, D, groups in (
        [(5, 60, 3)] if toy else [(2048, 10240, 8), (7, 5120, 1), (1000, 2048, 8), (33, 60, 3)]
    ):
        inputs = {"y_TD": torch.randn(T, D), "z_TD": torch.randn(T, D), "weight_D": torch.randn(D)}
        forms = [partial(module.gated_norm, groups=groups, eps=EPS) for module in (gated, gated_torch)]
        yield Case(f"gated norm {T} x {D} in {groups}", *forms, inputs, ("z_TD",), PLAIN)
    for T, E in [(5, 60)] if toy else [(2048, 4480), (7, 5120), (3000, 128), (33, 60)]:
        inputs = {"x": torch.randn(T, E), "weight": torch.randn(E)}
        yield Case(
            f"RMSNorm {T} x {E}",
            *(partial(module.rms_norm, eps=EPS) for module in (rms, rms_reference)),
            inputs,
            ("x",),
            PLAIN,
        )
        inputs = {"h_TE": torch.randn(T, E), "update_TE": torch.randn(T, E), "weight_E": torch.randn(E)}
        forms = [partial(module.residual_norm, eps=EPS) for module in (residual, residual_reference)]
        yield Case(f"residual norm {T} x {E}", *forms, inputs, ("h_TE", "update_TE"), PLAIN)
        yield Case(
            f"squared ReLU {T} x {E}",
            relu.squared_relu,
            relu_reference.squared_relu,
            {"x": torch.randn(T, E)},
            ("x",),
            PLAIN,
        )


def heads(toy: bool) -> Iterator[Case]:
    """Loss and gradient of a chunk of logits, which are the kernels' outputs, so without autograd."""
    for Q, V in [(3, 50)] if toy else [(256, 131_072), (5, 151_936), (64, 1000), (1, 1)]:
        targets = torch.randint(V, (Q,))

        def cross_entropy(logits_QV: Tensor, targets: Tensor = targets) -> tuple[Tensor, ...]:
            gradient = torch.softmax(logits_QV, -1)
            gradient[torch.arange(len(targets)), targets] -= 1
            return F.cross_entropy(logits_QV, targets, reduction="none"), gradient

        def forward_kl(logits_QV: Tensor, teacher_QV: Tensor) -> tuple[Tensor, ...]:
            log_p, log_q = (torch.log_softmax(t / 2.0, -1) for t in (logits_QV, teacher_QV))
            return 4.0 * (log_q.exp() * (log_q - log_p)).sum(-1), 2.0 * (log_p.exp() - log_q.exp())

        inputs = {"logits_QV": 3 * torch.randn(Q, V)}
        yield Case(
            f"cross-entropy {Q} x {V}", partial(losses.cross_entropy, targets_Q=targets, with_gradient=True),
            cross_entropy, inputs, ("logits_QV",), PLAIN, False,
        )  # fmt: skip
        inputs = {"logits_QV": 3 * torch.randn(Q, V), "teacher_QV": 3 * torch.randn(Q, V)}
        fast = partial(losses.forward_kl, temperature=2.0, with_gradient=True)
        yield Case(
            f"forward KL {Q} x {V}", fast, forward_kl, inputs, ("logits_QV", "teacher_QV"), PLAIN, False
        )


def linears(toy: bool) -> Iterator[Case]:
    """Against the recipe with products in float64: only the summation differs."""
    for T, I, O in (
        [(5, 130, 20)] if toy else [(4096, 4480, 22656), (333, 2048, 1024), (1, 130, 7), (129, 64, 200)]
    ):
        inputs = {"x": torch.randn(T, I), "weight_OI": torch.randn(O, I) / I**0.5}
        yield Case(
            f"FP8 linear {T} x {I} x {O}",
            fp8.linear,
            emulated_linear,
            inputs,
            ("x",),
            {FP32: 2e-3, BF16: 1e-2},
        )


def emulated_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    y: Tensor = _Recipe.apply(x, weight_OI)
    return y


class _Recipe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return fp8_torch.fake_quantize(x).double() @ fp8_torch.fake_quantize(weight, 128, 128).double().T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = fp8_torch.fake_quantize(dy).double() @ fp8_torch.fake_quantize(weight, 128, 128).double()
        return dx, fp8_torch.fake_quantize(dy, 128, 1).double().T @ fp8_torch.fake_quantize(
            x, 128, 1
        ).double()


def attentions(toy: bool) -> Iterator[Case]:
    shapes = [(4, 2, 12)] if toy else [(40, 8, 128), (32, 8, 128), (4, 1, 32)]
    batches = {"decode": ([1, 1], [30, 5]), "continuation": ([20, 3], [10, 40])}
    if not toy:
        batches |= {
            "long decode": ([1] * 5, [8191, 4, 700, 16000, 1]),
            "long continuation": ([500, 64, 1], [2000, 77, 5000]),
        }
    for H, K, P in shapes:
        for kind, (lengths, positions) in batches.items():
            most = max(length + position for length, position in zip(lengths, positions, strict=True))
            layout = Layout.contiguous(lengths, positions, range(len(lengths)), most)
            pools = torch.randn(2, len(lengths) * -(-most // layout.page_size), layout.page_size, K, P)
            T = sum(lengths)
            inputs = {
                "q_THP": torch.randn(T, H, P),
                "k_TKP": torch.randn(T, K, P),
                "v_TKP": torch.randn(T, K, P),
            }
            inputs |= {"keys": pools[0], "values": pools[1]}
            fast, expected = (
                partial(_paged, form, layout) for form in (attention.attention, attention_torch.attention)
            )
            yield Case(
                f"{kind}, {H} / {K} heads of {P}",
                fast,
                expected,
                inputs,
                tuple(inputs),
                {FP32: 1e-4, BF16: 2e-2},
                False,
            )


@torch.no_grad()
def _paged(
    form: Op, layout: Layout, q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    found = form(q_THP, k_TKP, v_TKP, layout, PagedCache(keys.clone(), values.clone()))
    assert isinstance(found, Tensor)
    return found
