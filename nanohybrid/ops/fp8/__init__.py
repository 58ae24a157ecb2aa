"""FP8 training: E4M3 operands with a scale for each 1 x 128 tile or 128 x 128 block. reference.py describes
the recipe.
"""

from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.fp8 import torch as torch_form
from nanohybrid.ops.fp8.reference import E4M3, GROUP, LARGEST
from nanohybrid.ops.fp8.torch import dequantize, fake_quantize, quantize

__all__ = ["E4M3", "GROUP", "LARGEST", "dequantize", "fake_quantize", "linear", "quantize"]

KERNELS = Kernel("nanohybrid.ops.fp8.kernels:linear", gradients=True)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I] W^T (+ bias), forward and both gradients with FP8 operands.

    The result and gradients are in their operands' dtypes.
    """
    form = choose(x, weight_OI, reference=torch_form.linear, torch=torch_form.linear, triton=KERNELS)
    y: Tensor = form(x, weight_OI, bias_O)
    return y
