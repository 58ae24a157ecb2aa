"""The equation for whole matrices, in any precision: the reference for the block-wise forms.

N outputs, K inputs, G groups of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.quantized.formats import ZERO, format_of


def values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The number that each code represents before scaling, [N, K]."""
    if format_of(codes) != "int4":
        return codes.to(dtype)
    low_high = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return low_high.to(dtype) - ZERO


def dequantize(codes: Tensor, scales_NG: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """w = value(code) scale, [N, K]."""
    values_NK = values(codes, torch.float64)
    group = values_NK.shape[1] // scales_NG.shape[1]
    return (values_NK * scales_NG.double().repeat_interleave(group, dim=1)).to(dtype)


def linear(x: Tensor, codes: Tensor, scales_NG: Tensor) -> Tensor:
    """y = x w^T in x's dtype, with w rounded to it first."""
    return F.linear(x, dequantize(codes, scales_NG, x.dtype))
