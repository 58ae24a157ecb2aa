"""Mamba-2's gate, followed by its RMSNorm within groups of channels."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.gated_norm import reference
from nanohybrid.ops.gated_norm import torch as torch_form

NUMBA = Kernel("nanohybrid.ops.gated_norm.numba:gated_norm", gradients=True)
TRITON = Kernel("nanohybrid.ops.gated_norm.triton_autograd:gated_norm", gradients=True)


def gated_norm(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of y silu(z) within each of `groups` groups of channels, times weight.

    Sums are fp32, cast once to the dtype of z.
    """
    form = choose(
        y_TD,
        z_TD,
        weight_D,
        reference=reference.gated_norm,
        torch=torch_form.gated_norm,
        numba=NUMBA,
        triton=TRITON,
    )
    normed_TD: Tensor = form(y_TD, z_TD, weight_D, groups, eps)
    return normed_TD
