"""The FP8 recipe on any device: the numbers of FP8, the speed of fp32.

Operands are quantized as reference.py says, dequantized, and multiplied with fp32 accumulation. That differs from a scaled FP8
matrix product only in the order of fp32 sums. All groups of a matrix are quantized at once; edges are padded with zeros, which
change no maximum.

T tokens, I inputs, O outputs, M rows, K columns.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanohybrid.ops.fp8.reference import E4M3, GROUP, LARGEST, SMALLEST_AMAX


def quantize(x_MK: Tensor, rows: int = 1, columns: int = GROUP) -> tuple[Tensor, Tensor]:
    """E4M3 values [M, K] and fp32 scales [ceil(M / rows), ceil(K / columns)] of groups of rows x columns."""
    grouped = _grouped(x_MK.float(), rows, columns)
    scales = grouped.abs().amax(dim=(1, 3)).clamp_min_(SMALLEST_AMAX).div_(LARGEST)
    q = (grouped / scales[:, None, :, None]).to(E4M3)
    return _flat(q, x_MK.shape), scales


def dequantize(q_MK: Tensor, scales: Tensor, rows: int = 1, columns: int = GROUP) -> Tensor:
    """The fp32 numbers that e4m3 values and their scales stand for."""
    return _flat(_grouped(widened(q_MK), rows, columns) * scales[:, None, :, None], q_MK.shape)


def rounded(x_MK: Tensor, rows: int = 1, columns: int = GROUP) -> Tensor:
    """The fp32 matrix that x becomes in FP8."""
    return dequantize(*quantize(x_MK, rows, columns), rows, columns)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I] W^T (+ bias), forward and both gradients with FP8 operands; the result and gradients in their operands' dtypes."""
    return affine(_Linear.apply, x, weight_OI, bias_O)


def affine(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`product` of x and W in their own dtypes, whatever autocast is on, and the bias."""
    with torch.autocast(x.device.type, enabled=False):
        y = product(x, weight_OI)
        return y if bias_O is None else y + bias_O.to(y.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        rounded_OI = rounded(weight_OI, GROUP, GROUP)
        ctx.save_for_backward(x, rounded_OI)
        ctx.dtype = weight_OI.dtype
        y_TO = rounded(x_TI) @ rounded_OI.T
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, rounded_OI = ctx.saved_tensors
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx = (rounded(dy_TO) @ rounded_OI).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight_OI = (rounded(dy_TO, GROUP, 1).T @ rounded(x_TI, GROUP, 1)).to(ctx.dtype)
        return dx, dweight_OI


@cache
def _numbers(device: torch.device) -> Tensor:
    """The 256 numbers of e4m3 by their bits."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).float()


def widened(q_MK: Tensor) -> Tensor:
    """E4M3 as fp32. A look-up: on a CPU torch's own cast takes five times as long."""
    bits = q_MK.contiguous().view(torch.uint8).int().flatten()
    return _numbers(q_MK.device).index_select(0, bits).view(q_MK.shape)


def _grouped(x_MK: Tensor, rows: int, columns: int) -> Tensor:
    """[M, K] as [row groups, rows, column groups, columns], with zeros at the edges where a group is not full."""
    height, width = x_MK.shape
    below, right = -height % rows, -width % columns
    if below or right:
        x_MK = F.pad(x_MK, (0, right, 0, below))
    return x_MK.view((height + below) // rows, rows, (width + right) // columns, columns)


def _flat(grouped: Tensor, shape: torch.Size) -> Tensor:
    down, rows, across, columns = grouped.shape
    return grouped.reshape(down * rows, across * columns)[: shape[0], : shape[1]]
