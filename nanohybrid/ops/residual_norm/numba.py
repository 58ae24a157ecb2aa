"""The residual sum, and its norm by the compiled loops, for CPUs."""

from torch import Tensor

from nanohybrid.ops.rms_norm.numba import rms_norm


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Bit for bit what a sum and the model's RMSNorm give one after the other."""
    s_TE = h_TE + update_TE
    return s_TE, rms_norm(s_TE, weight_E, eps)
