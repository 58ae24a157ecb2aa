"""The residual norm by torch's rms_norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm, with the bits of a sum and torch's form of RMSNorm one after the other."""
    s_TE = h_TE + update_TE
    dtype = torch.promote_types(s_TE.dtype, torch.float32)
    return s_TE, (F.rms_norm(s_TE.to(dtype), s_TE.shape[-1:], None, eps) * weight_E.to(dtype)).to(s_TE.dtype)
