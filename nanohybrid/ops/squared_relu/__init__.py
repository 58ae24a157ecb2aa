"""The squared ReLU of Nemotron's MLPs: y = max(x, 0)^2 (So et al. 2021, Primer)."""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.squared_relu import reference
from nanohybrid.ops.squared_relu import torch as torch_form

NUMBA = Kernel("nanohybrid.ops.squared_relu.numba:squared_relu", gradients=True)
TRITON = Kernel("nanohybrid.ops.squared_relu.triton:squared_relu", gradients=True)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 of a tensor of any shape, in its dtype."""
    y: Tensor = choose(
        x, reference=reference.squared_relu, torch=torch_form.squared_relu, numba=NUMBA, triton=TRITON
    )(x)
    return y
