"""The numba form of the residual norm: torch's sum, and the numba form of RMSNorm."""

from torch import Tensor

from nanohybrid.ops.rms_norm.numba import rms_norm


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm, with the bits of a sum and the model's RMSNorm one after the other."""
    s_TE = h_TE + update_TE
    return s_TE, rms_norm(s_TE, weight_E, eps)
