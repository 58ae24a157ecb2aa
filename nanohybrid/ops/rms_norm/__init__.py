"""RMSNorm over the last dimension (Zhang & Sennrich 2019), computed in fp32 with one cast at the end."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.rms_norm import reference
from nanohybrid.ops.rms_norm import torch as torch_form

NUMBA = Kernel("nanohybrid.ops.rms_norm.numba:rms_norm", gradients=True)
TRITON = Kernel("nanohybrid.ops.rms_norm.triton:rms_norm", gradients=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [..., width] in fp32 (float64 for float64), cast once to x's dtype.

    On a CPU under autocast: to autocast's dtype.
    """
    form = choose(
        x, weight, reference=reference.rms_norm, torch=torch_form.rms_norm, numba=NUMBA, triton=TRITON
    )
    normed: Tensor = form(x, weight, eps)
    return normed
