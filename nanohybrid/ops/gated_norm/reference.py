"""u = y silu(z);  out = weight u / sqrt(mean_group(u^2) + eps): first the gate, then the norm."""

import torch
from torch import Tensor


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """Computed in fp32 (float64 for float64), cast once at the end to the dtype of z."""
    dtype = torch.promote_types(y_TD.dtype, torch.float32)
    z = z_TD.to(dtype)
    u_TGd = (y_TD.to(dtype) * z / (1 + torch.exp(-z))).unflatten(-1, (groups, -1))
    normed = u_TGd / torch.sqrt((u_TGd**2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight_D.to(dtype)).to(z_TD.dtype)
