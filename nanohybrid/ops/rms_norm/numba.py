"""RMSNorm in compiled loops with its gradient, for CPUs."""

import torch
from torch import Tensor

from nanohybrid.ops.gated_norm.numba import TAKEN, normed
from nanohybrid.ops.rms_norm import torch as torch_form


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In x's dtype; under autocast in autocast's, which every reader of a norm would cast to anyway, each for itself."""
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.dtype not in TAKEN or narrow not in TAKEN or not x.numel():
        return torch_form.rms_norm(x, weight, eps)
    return normed(x.reshape(-1, x.shape[-1]), None, weight, 1, eps, narrow).view(x.shape)
