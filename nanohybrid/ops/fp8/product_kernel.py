"""The block-scaled FP8 product in Triton: sum over groups of 128 of (q_a . q_b) scale_a scale_b.

Tensor cores accumulate e4m3 products in less than fp32. So a group's sum is moved to fp32 registers before
the next group begins, where it is scaled anyway.

M, N rows of the operands · K the summed dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.dispatch import interpreted
from nanohybrid.ops.fp8.quantize_kernels import Operand
from nanohybrid.ops.fp8.reference import GROUP

BLOCK_M, BLOCK_N = 128, 128


@triton.jit
def product_kernel(
    a, b, scale_a, scale_b, out, M, N, groups, stride_a, stride_b, BLOCKS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out [M, N] from a [M, K] and b [N, K].

    BLOCKS: b has a scale for 128 of its rows, else one for each row.

    BAND row blocks are processed together through all columns, so the operands' tiles stay in the L2 cache.
    """
    down, across, place = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.program_id(0)
    first = place // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    m = (first + place % (BAND * across) % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place % (BAND * across) // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, GROUP)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        a_MK = tl.load(
            a + m[:, None] * stride_a + (group * GROUP + k)[None, :], mask=(m < M)[:, None], other=0.0
        )
        b_KN = tl.load(
            b + n[None, :] * stride_b + (group * GROUP + k)[:, None], mask=(n < N)[None, :], other=0.0
        )
        if UPCAST:
            found = tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32), input_precision="ieee")
        else:
            found = tl.dot(a_MK, b_KN)
        by_row = tl.load(scale_a + m * groups + group, mask=m < M, other=0.0)
        by_column = tl.load(scale_b + (n // GROUP if BLOCKS else n) * groups + group, mask=n < N, other=0.0)
        total += found * by_row[:, None] * by_column[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :],
        total.to(out.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T in `dtype`; a in tiles, b in tiles or in blocks."""
    (M, K), N = a.q.shape, b.q.shape[0]
    out = torch.empty((M, N), dtype=dtype, device=a.q.device)
    product_kernel[triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),](
        a.q, b.q, a.scales, b.scales, out, M, N, K // GROUP, a.q.stride(0), b.q.stride(0),
        BLOCKS=b.scales.shape[0] != N, UPCAST=interpreted(), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, GROUP=GROUP,
        BAND=8, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
