"""out = weight x / sqrt(mean(x^2) + eps)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computed in fp32 (float64 for float64), cast once to x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)
