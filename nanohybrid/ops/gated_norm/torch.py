"""The gated norm by torch's silu and rms_norm, which are fused."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """Computed in fp32 (float64 for float64), cast once at the end to the dtype of z."""
    dtype = torch.promote_types(y_TD.dtype, torch.float32)
    u_TGd = (y_TD.to(dtype) * F.silu(z_TD.to(dtype))).unflatten(-1, (groups, -1))
    return (F.rms_norm(u_TGd, u_TGd.shape[-1:], None, eps).flatten(-2) * weight_D.to(dtype)).to(z_TD.dtype)
