"""RMSNorm of the residual stream: fp32 throughout, one cast at the end."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [..., width] in fp32 (float64 for float64), cast once to x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (F.rms_norm(x.to(dtype), x.shape[-1:], None, eps) * weight.to(dtype)).to(x.dtype)
