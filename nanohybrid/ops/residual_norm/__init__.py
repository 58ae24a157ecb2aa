"""The step between two layers: add the mixer's output to the residual stream, and norm the sum."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.residual_norm import reference
from nanohybrid.ops.residual_norm import torch as torch_form

NUMBA = Kernel("nanohybrid.ops.residual_norm.numba:residual_norm", gradients=True)
TRITON = Kernel("nanohybrid.ops.residual_norm.triton_autograd:residual_norm", gradients=True)


def residual_norm(h_TE: Tensor, update_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = h + update in h's dtype, and RMSNorm(s) weight.

    Sums are fp32 (float64 for float64), cast once to h's dtype.
    """
    form = choose(
        h_TE,
        update_TE,
        weight_E,
        reference=reference.residual_norm,
        torch=torch_form.residual_norm,
        numba=NUMBA,
        triton=TRITON,
    )
    s_TE, normed_TE = form(h_TE, update_TE, weight_E, eps)
    return s_TE, normed_TE
