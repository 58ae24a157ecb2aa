"""The numba form of RMSNorm: the gated norm without a gate and with one group."""

import torch
from torch import Tensor

from nanohybrid.ops.gated_norm.numba import SUPPORTED, normed
from nanohybrid.ops.rms_norm import torch as torch_form


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In x's dtype; under autocast in autocast's, to which each linear that reads the norm would cast it."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.dtype not in SUPPORTED or dtype not in SUPPORTED or not x.numel():
        return torch_form.rms_norm(x, weight, eps)
    return normed(x.reshape(-1, x.shape[-1]), None, weight, 1, eps, dtype).view(x.shape)
