"""Products with quantized weights on a GPU for small batches. The codes are read once, as they are stored.

A program computes 16 or more outputs of all rows. Codes convert to operands exactly, so an 8-bit product is
scaled in fp32 after each group's sum. For int4, even and odd inputs are multiplied separately, which avoids
reordering nibbles, and the groups of 32 are scaled before the product.

M rows of x · N outputs · K inputs · G groups of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.launch import MIN_DOT, cdiv, dot_dtype, next_power_of_2
from nanohybrid.ops.quantized.formats import format_of

MAX_ROWS = 64  # larger products are compute bound, and torch's product of dequantized blocks is used
MIN_PROGRAMS = 256  # two for each multiprocessor
STEP = 128  # inputs at a time, where groups do not determine it


def linear(x: Tensor, codes: Tensor, scales_NG: Tensor) -> Tensor:
    """x [..., K] times the transposed weight, [..., N], in x's dtype."""
    x_MK = x.reshape(-1, x.shape[-1])
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    (M, K), (N, G) = x_MK.shape, scales_NG.shape
    if M > MAX_ROWS:
        from nanohybrid.ops.quantized.torch import by_blocks  # not at the top: that module names this one

        return by_blocks(x, codes, scales_NG)
    y_MN = x.new_empty(M, N)
    outputs = next((size for size in (128, 64, 32) if cdiv(N, size) >= MIN_PROGRAMS), MIN_DOT)
    shared = {
        "TYPE": dot_dtype(x.dtype),
        "ROWS": next_power_of_2(M, MIN_DOT),
        "OUTPUTS": outputs,
        "num_warps": 4,
        "num_stages": 4,
    }
    grid, format = (cdiv(N, outputs),), format_of(codes)
    if format == "int4":
        _nibbles[grid](
            x_MK,
            codes,
            scales_NG,
            y_MN,
            M,
            N,
            K,
            G,
            x_MK.stride(0),
            STEP=STEP // 2,
            GROUP=K // G // 2,
            **shared,
        )
    else:
        step = STEP if G == 1 else K // G
        codes = codes.view(torch.uint8) if format == "fp8" else codes
        _bytes[grid](
            x_MK,
            codes,
            scales_NG,
            y_MN,
            M,
            N,
            K,
            G,
            x_MK.stride(0),
            STEP=step,
            GROUPED=G > 1,
            FP8=format == "fp8",
            **shared,
        )
    return y_MN.view(*x.shape[:-1], N)


@triton.jit
def _bytes(
    x, codes, scales, y, M, N, K, G, stride, TYPE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    STEP: tl.constexpr, GROUPED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    m, n, step = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, STEP)
    is_m, is_n = m < M, n < N
    row = codes + n.to(tl.int64)[None, :] * K
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, K, STEP):
        k = first + step
        is_k = k < K
        x_tile = tl.load(
            x + m[:, None] * stride + k[None, :], mask=is_m[:, None] & is_k[None, :], other=0
        ).to(TYPE)
        w_tile = tl.load(row + k[:, None], mask=is_k[:, None] & is_n[None, :], other=0)
        if FP8:
            w_tile = _fp8(w_tile)
        part = tl.dot(x_tile, w_tile.to(TYPE), input_precision="ieee")
        if GROUPED:
            part *= tl.load(scales + n * G + first // STEP, mask=is_n, other=0).to(tl.float32)[None, :]
        total += part
    if not GROUPED:
        total *= tl.load(scales + n, mask=is_n, other=0).to(tl.float32)[None, :]
    if FP8:
        total *= 256
    tl.store(
        y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=is_m[:, None] & is_n[None, :]
    )


@triton.jit
def _fp8(code):
    """e4m3 bytes divided by 256, as fp16.

    Shifted left, the bits of e4m3 are those of an fp16 number; no hardware support is needed.
    """
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _nibbles(
    x, codes, scales, y, M, N, K, G, stride,
    TYPE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """STEP and GROUP count bytes of two inputs each."""
    m, n, step = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, STEP)
    is_m, is_n = m < M, n < N
    half = K // 2
    row = n.to(tl.int64)[None, :]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, half, STEP):
        b = first + step
        is_b = b < half
        inside = is_b[:, None] & is_n[None, :]
        code = tl.load(codes + row * half + b[:, None], mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + row * G + b[:, None] // GROUP, mask=inside, other=0).to(tl.float32)
        even_at = x + m[:, None] * stride + 2 * b[None, :]
        inside_x = is_m[:, None] & is_b[None, :]
        even, odd = (
            tl.load(even_at, mask=inside_x, other=0).to(TYPE),
            tl.load(even_at + 1, mask=inside_x, other=0).to(TYPE),
        )
        total = tl.dot(
            even, (((code & 15) - 8).to(tl.float32) * scale).to(TYPE), total, input_precision="ieee"
        )
        total = tl.dot(
            odd, (((code >> 4) - 8).to(tl.float32) * scale).to(TYPE), total, input_precision="ieee"
        )
    tl.store(
        y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=is_m[:, None] & is_n[None, :]
    )
