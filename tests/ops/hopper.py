"""Compiles every Triton kernel that the ops launch for sm_90, without a GPU, and prints a line of JSON for
each.

Triton's interpreter accepts code that its compiler rejects (types that change in a loop, shapes that are not
powers of two), so both are tested where there is no GPU. The launches are real, at the 9B's shapes. A mock
driver that only names the target takes the place of CUDA's, and kernels are compiled where they would run.
Their results are not checked.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanohybrid.ops.attention import PagedCache
from nanohybrid.ops.attention import triton as attention
from nanohybrid.ops.causal_conv import triton_autograd as conv
from nanohybrid.ops.fp8 import kernels as fp8
from nanohybrid.ops.gated_norm import triton_autograd as gated_norm
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.losses import kernels as losses
from nanohybrid.ops.mamba_step import triton as mamba_step
from nanohybrid.ops.quantized import triton as quantized
from nanohybrid.ops.residual_norm import triton_autograd as residual_norm
from nanohybrid.ops.rms_norm import triton as rms_norm
from nanohybrid.ops.squared_relu import triton as squared_relu
from nanohybrid.ops.ssd_scan import triton_autograd as ssd_scan
from nanohybrid.ops.ssd_scan.inputs import SSDInputs

T, H, P, G, N, E = 200, 128, 80, 8, 128, 4480
BF16 = torch.bfloat16


class Target:
    """The part of a driver that Triton needs to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


seen: set[str] = set()
run = JITFunction.run


def compile_only(self, *arguments, grid, warmup, **options):
    compiled = run(self, *arguments, grid=grid, warmup=True, **options)
    if compiled.hash not in seen:
        seen.add(compiled.hash)
        ptx = compiled.asm["ptx"]
        print(
            json.dumps(
                {
                    "kernel": self.__name__,
                    "tensor_cores": "mma.sync" in ptx or "wgmma" in ptx,
                    **resources(compiled),
                }
            ),
            flush=True,
        )
    return compiled


def resources(compiled) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, bytes of shared memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return {"registers": registers, "spilled": stack, "shared": compiled.metadata.shared}


def leaf(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def launch() -> None:
    layout = Layout.packed([60, 140])
    f32 = torch.float32
    inputs = SSDInputs(
        leaf(T, H, P), leaf(T, H, dtype=f32), leaf(H, dtype=f32), leaf(T, G, N), leaf(T, G, N), leaf(H,
        dtype=f32), leaf(2, H, P, N, dtype=f32),
    )  # fmt: skip
    y, final = ssd_scan.ssd_scan(inputs, layout)
    (y.sum() + final.sum()).backward()
    channels = H * P + 2 * G * N
    conv.conv_silu(leaf(T, channels), leaf(channels, 4), leaf(channels), layout, output_final_state=False)[
        0
    ].sum().backward()
    gated_norm.gated_norm(
        leaf(T, H * P, dtype=f32), leaf(T, H * P), leaf(H * P, dtype=f32), G, 1e-5
    ).sum().backward()
    rms_norm.rms_norm(leaf(T, E), leaf(E, dtype=f32), 1e-5).sum().backward()
    sum(
        t.sum() for t in residual_norm.residual_norm(leaf(T, E), leaf(T, E), leaf(E, dtype=f32), 1e-5)
    ).backward()
    squared_relu.squared_relu(leaf(T, E)).sum().backward()
    fp8.linear(leaf(T, E), leaf(1024, E, dtype=f32)).sum().backward()
    losses.cross_entropy(torch.randn(4, 131_072, dtype=BF16), torch.zeros(4, dtype=torch.long), True)
    losses.forward_kl(torch.randn(4, 131_072, dtype=BF16), torch.randn(4, 131_072, dtype=BF16), 1.0, True)
    decode(channels)
    attend()
    weight_only()


def decode(channels: int) -> None:
    S = 2
    layout = Layout.with_cache([1] * S, [5, 6], [0, 1], [[0], [1]], 256)
    per_head = [torch.randn(H, dtype=BF16) for _ in range(3)]
    pools = torch.randn(S, 3, channels, dtype=BF16), torch.randn(S, H, P, N)
    inputs = torch.randn(S, channels, dtype=BF16), torch.randn(S, H, dtype=BF16)
    weights = torch.randn(channels, 4, dtype=BF16), torch.randn(channels, dtype=BF16)
    with torch.no_grad():
        mamba_step.mamba_step(*inputs, *weights, *per_head, *pools, layout, G, (0.0, float("inf")))


def attend() -> None:
    for lengths in ([1, 1], [70, 3]):
        layout = Layout.contiguous(lengths, [200, 9], [0, 1], 300)
        q, k, v = (torch.randn(sum(lengths), heads, 128, dtype=BF16) for heads in (40, 8, 8))
        attention.attention(q, k, v, layout, PagedCache(*torch.randn(2, 6, 128, 8, 128, dtype=BF16)))


def weight_only() -> None:
    """Codes of all three formats, for one row and for sixteen."""
    int8 = torch.zeros(1024, E, dtype=torch.int8), torch.ones(1024, E // 128, dtype=BF16)
    int4 = torch.zeros(1024, E // 2, dtype=torch.uint8), torch.ones(1024, E // 32, dtype=BF16)
    fp8_ = torch.zeros(1024, E).to(torch.float8_e4m3fn), torch.ones(1024, 1)
    for codes, scales in (int8, int4, fp8_):
        for rows in (1, 16):
            quantized.linear(torch.randn(rows, E, dtype=BF16), codes, scales)


if __name__ == "__main__":
    driver.set_active(Target())
    JITFunction.run = compile_only
    launch()
