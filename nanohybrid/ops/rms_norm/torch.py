"""RMSNorm by torch's rms_norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computed in fp32 (float64 for float64), cast once to x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (F.rms_norm(x.to(dtype), x.shape[-1:], None, eps) * weight.to(dtype)).to(x.dtype)
