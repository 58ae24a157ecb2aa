"""The FP8 recipe on any device: the numbers of FP8 at the speed of fp32.

Operands are quantized as in reference.py, dequantized, and multiplied with fp32 accumulation. The result
differs from a scaled FP8 matrix product only in the order of fp32 sums. All groups of a matrix are quantized
at once; edges are padded with zeros, which change no maximum.

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
    """The fp32 numbers of e4m3 values and their scales."""
    return _flat(_grouped(e4m3_to_fp32(q_MK), rows, columns) * scales[:, None, :, None], q_MK.shape)


def fake_quantize(x_MK: Tensor, rows: int = 1, columns: int = GROUP) -> Tensor:
    """x quantized and dequantized, in fp32."""
    return dequantize(*quantize(x_MK, rows, columns), rows, columns)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I] W^T (+ bias), forward and both gradients with FP8 operands.

    The result and gradients are in their operands' dtypes.
    """
    return with_bias(_Linear.apply, x, weight_OI, bias_O)


def with_bias(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """`product` of x and W in their own dtypes, whatever autocast is enabled, plus the bias."""
    with torch.autocast(x.device.type, enabled=False):
        y = product(x, weight_OI)
        return y if bias_O is None else y + bias_O.to(y.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        weight_8_OI = fake_quantize(weight_OI, GROUP, GROUP)
        ctx.save_for_backward(x, weight_8_OI)
        ctx.dtype = weight_OI.dtype
        y_TO = fake_quantize(x_TI) @ weight_8_OI.T
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_8_OI = ctx.saved_tensors
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx = (fake_quantize(dy_TO) @ weight_8_OI).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight_OI = (fake_quantize(dy_TO, GROUP, 1).T @ fake_quantize(x_TI, GROUP, 1)).to(ctx.dtype)
        return dx, dweight_OI


@cache
def _e4m3_values(device: torch.device) -> Tensor:
    """The 256 numbers of e4m3 by their bits."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).float()


def e4m3_to_fp32(q_MK: Tensor) -> Tensor:
    """e4m3 as fp32, by a lookup table: torch's own cast takes five times as long on a CPU."""
    bits = q_MK.contiguous().view(torch.uint8).int().flatten()
    return _e4m3_values(q_MK.device).index_select(0, bits).view(q_MK.shape)


def _grouped(x_MK: Tensor, rows: int, columns: int) -> Tensor:
    """[M, K] as [row groups, rows, column groups, columns], padded with zeros at the edges."""
    height, width = x_MK.shape
    below, right = -height % rows, -width % columns
    if below or right:
        x_MK = F.pad(x_MK, (0, right, 0, below))
    return x_MK.view((height + below) // rows, rows, (width + right) // columns, columns)


def _flat(grouped: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_grouped`, cut to `shape`."""
    down, rows, across, columns = grouped.shape
    return grouped.reshape(down * rows, across * columns)[: shape[0], : shape[1]]
