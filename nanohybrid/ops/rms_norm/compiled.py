"""RMSNorm in compiled loops with its gradient, for CPUs."""

import torch
from torch import Tensor

from nanohybrid.ops.gated_norm.compiled import TAKEN, normed
from nanohybrid.ops.rms_norm import fused


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In x's dtype; under autocast in autocast's, which every reader of a norm would cast to anyway, each for itself."""
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.dtype not in TAKEN or narrow not in TAKEN or not x.numel():
        return fused.rms_norm(x, weight, eps)
    return normed(x.reshape(-1, x.shape[-1]), None, weight, 1, eps, narrow).view(x.shape)
