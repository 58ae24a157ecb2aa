"""Block quantization in Triton: a matrix is read once for all layouts that a linear's products need.

FP8 products need both operands contiguous along the summed dimension, so an operand that is summed over rows
is stored transposed: a kernel writes q and q^T. Along the sum both are padded with zeros to whole groups of
128, which add nothing and keep rows aligned. The bits are those of reference.py. A group with a NaN or
infinity becomes NaN as a whole.

M rows · K columns · scales: one for each 1 x 128 tile, 128 x 1 tile or 128 x 128 block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.dispatch import interpreted
from nanohybrid.ops.fp8.reference import E4M3, GROUP, LARGEST, SMALLEST_AMAX


class Operand(NamedTuple):
    """An operand of a product: q [rows, sum], padded with zeros along the sum, and a scale per group.

    scales: [rows, groups], or for square blocks [blocks of rows, groups].
    """

    q: Tensor
    scales: Tensor


@triton.jit
def _scale(largest, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    return tl.math.div_rn(tl.maximum(largest, SMALLEST), LARGEST)


@triton.jit
def _magnitude(x):
    """|x|, infinite for NaN: maxima treat NaN differently, but an infinite scale makes the group NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _e4m3(x, EMULATE: tl.constexpr):
    """x as e4m3.

    EMULATE: round to e4m3 numbers first, since the interpreter's cast loses the carry into the exponent.
    """
    if EMULATE:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: the last bit of the sum is 2^-9, the subnormals' step
        x = tl.where(x == x, tl.where(tl.abs(x) < 0.015625, small, normal), x)
    return x.to(tl.float8e4nv)


@triton.jit
def tile_kernel(
    x, q, scales, q_t, scales_t, M, K, stride_x, stride_q, stride_t, groups_m, groups_k, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr, GROUP:
    tl.constexpr,
):  # fmt: skip
    """A 128 x 128 square.

    ROWS: q [M, K] with scales [M, K / 128]. COLUMNS: q_t [K, M] with scales_t [K, M / 128].
    """
    m_block, k_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, k = m_block * GROUP + tl.arange(0, GROUP), k_block * GROUP + tl.arange(0, GROUP)
    x_MK = tl.load(
        x + m[:, None] * stride_x + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
    ).to(tl.float32)
    size = _magnitude(x_MK)
    if ROWS:
        scale_M = _scale(tl.max(size, 1), SMALLEST, LARGEST)
        tl.store(scales + m * groups_k + k_block, scale_M, mask=m < M)
        tl.store(
            q + m[:, None] * stride_q + k[None, :],
            _e4m3(tl.math.div_rn(x_MK, scale_M[:, None]), EMULATE),
            mask=(m < M)[:, None],
        )
    if COLUMNS:
        scale_K = _scale(tl.max(size, 0), SMALLEST, LARGEST)
        tl.store(scales_t + k.to(tl.int64) * groups_m + m_block, scale_K, mask=k < K)
        q_MK = _e4m3(tl.math.div_rn(x_MK, scale_K[None, :]), EMULATE)
        tl.store(q_t + k.to(tl.int64)[None, :] * stride_t + m[:, None], q_MK, mask=(k < K)[None, :])


@triton.jit
def block_kernel(
    x, q, q_t, scales, scales_t, M, K, stride_x, stride_q, stride_t, groups_m, groups_k,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A 128 x 128 square under one scale: q, scales [M / 128, K / 128], and their transposes."""
    m_block, k_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, k = m_block * GROUP + tl.arange(0, GROUP), k_block * GROUP + tl.arange(0, GROUP)
    x_MK = tl.load(
        x + m[:, None] * stride_x + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
    ).to(tl.float32)
    scale = _scale(tl.max(tl.max(_magnitude(x_MK), 1), 0), SMALLEST, LARGEST)
    q_MK = _e4m3(tl.math.div_rn(x_MK, scale), EMULATE)
    tl.store(scales + m_block * groups_k + k_block, scale)
    tl.store(scales_t + k_block * groups_m + m_block, scale)
    tl.store(q + m[:, None] * stride_q + k[None, :], q_MK, mask=(m < M)[:, None])
    tl.store(q_t + k.to(tl.int64)[None, :] * stride_t + m[:, None], q_MK, mask=(k < K)[None, :])


def quantize_tiles(
    x_MK: Tensor, rows: bool = True, columns: bool = True
) -> tuple[Operand | None, Operand | None]:
    """x in 1 x 128 tiles along K (where `rows`), and x^T in 1 x 128 tiles along M (where `columns`)."""
    M, K, down, across = _sizes(x_MK)
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    in_rows = _operand(M, K, (M, across), x) if rows else None
    transposed = _operand(K, M, (K, down), x) if columns else None
    q, scales = in_rows or (x, x)  # a layout that is not wanted is not written, so any pointer will do
    q_t, scales_t = transposed or (x, x)
    tile_kernel[down, across](
        x,
        q,
        scales,
        q_t,
        scales_t,
        M,
        K,
        x.stride(0),
        q.stride(0),
        q_t.stride(0),
        down,
        across,
        ROWS=rows,
        COLUMNS=columns,
        **_constants(),
    )
    return in_rows, transposed


def quantize_blocks(weight_MK: Tensor) -> tuple[Operand, Operand]:
    """A weight and its transpose in 128 x 128 blocks, with the same numbers and scales."""
    M, K, down, across = _sizes(weight_MK)
    x = weight_MK if weight_MK.stride(1) == 1 else weight_MK.contiguous()
    in_rows, transposed = _operand(M, K, (down, across), x), _operand(K, M, (across, down), x)
    block_kernel[down, across](
        x,
        in_rows.q,
        transposed.q,
        in_rows.scales,
        transposed.scales,
        M,
        K,
        x.stride(0),
        in_rows.q.stride(0),
        transposed.q.stride(0),
        down,
        across,
        **_constants(),
    )
    return in_rows, transposed


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    M, K = x.shape
    return M, K, triton.cdiv(M, GROUP), triton.cdiv(K, GROUP)


def _operand(rows: int, total: int, scales: tuple[int, int], like: Tensor) -> Operand:
    q = torch.empty((rows, triton.cdiv(total, GROUP) * GROUP), dtype=torch.uint8, device=like.device).view(
        E4M3
    )
    return Operand(q, torch.empty(scales, dtype=torch.float32, device=like.device))


def _constants() -> dict[str, object]:
    return dict(SMALLEST=SMALLEST_AMAX, LARGEST=LARGEST, EMULATE=interpreted(), GROUP=GROUP, num_warps=8)
