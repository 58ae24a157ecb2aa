"""What the hosts of Triton kernels share: sizes of tiles, and the type in which tiles are multiplied."""

import torch
import triton.language as tl

from nanohybrid.ops.dispatch import interpreted

LEAST_DOT = 16  # tl.dot takes no side shorter than this

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`: the only sizes a tile may have."""
    return max(least, 1 << (n - 1).bit_length())


def blocks(n: int, size: int) -> int:
    """How many tiles of `size` cover n."""
    return -(-n // size)


def operand(dtype: torch.dtype) -> tl.dtype:
    """What the operands of tl.dot are cast to where the data are `dtype`: that, but not bf16 in the interpreter, which
    multiplies bf16 wrongly (errors of 1e11 in Triton 3.6)."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return _TYPES[dtype]


def rows_in_place(x: torch.Tensor) -> torch.Tensor:
    """x [T, ...] whose rows are contiguous, as slices of one projection are: kernels take the rows' stride, and no copy is made."""
    return x if x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()
