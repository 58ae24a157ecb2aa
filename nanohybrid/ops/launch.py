"""Helpers for launching Triton kernels: tile sizes, and the dtype in which tiles are multiplied."""

import torch
import triton.language as tl

from nanohybrid.ops.dispatch import interpreted

MIN_DOT = 16  # tl.dot accepts no smaller side

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def next_power_of_2(n: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least n and `minimum`: a tile's size must be one."""
    return max(minimum, 1 << (n - 1).bit_length())


def cdiv(n: int, size: int) -> int:
    """How many tiles of `size` cover n."""
    return -(-n // size)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of tl.dot for data in `dtype`: the same, or fp32 for bf16 in the interpreter.

    The interpreter multiplies bf16 wrongly (errors of 1e11 in Triton 3.6).
    """
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return _TYPES[dtype]


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, ...], copied unless each row is contiguous: kernels take the rows' stride, so slices of a
    projection need no copy.
    """
    return x if x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()
