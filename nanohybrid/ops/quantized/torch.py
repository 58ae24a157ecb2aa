"""Quantize, dequantize and multiply in blocks of rows, so that no second matrix is ever in memory in fp32.

N outputs, K inputs, G groups of a row, D weights of a group.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.fp8.torch import e4m3_to_fp32
from nanohybrid.ops.quantized import reference
from nanohybrid.ops.quantized.formats import CODES, SCALES, ZERO, format_of, group_of, holds, shapes
from nanohybrid.ops.quantized.search import SMALLEST, best_scales, codes_under

BLOCK = 1 << 19  # weights per block: 2 MiB in fp32, which is also faster than larger blocks
TRITON = Kernel("nanohybrid.ops.quantized.triton:linear")
LARGEST = {"int8": 127.0, "fp8": 448.0}


class WeightRows(Protocol):
    """A weight [N, K] whose rows are computed on access, so that it is never whole in memory.

    `quantize` takes it in place of a Tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def is_meta(self) -> bool: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


@torch.no_grad()
def quantize(
    weight_NK: Tensor | WeightRows, format: str, importance_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales (formats.py) of a weight of any floating dtype, on its device.

    Needs about 20 MiB beside them.

    importance_K: mean squares of the inputs in use, by which int4 weights its errors. Raises ValueError where
    the format is unknown or cannot store such rows, or a weight is not finite.
    """
    outputs, inputs = weight_NK.shape
    if format not in CODES:
        raise ValueError(f"the format is {format!r}: known are {', '.join(CODES)}")
    if not holds(format, inputs):
        raise ValueError(
            f"rows of {inputs} have no {format} form: groups of {group_of(format, inputs)} do not divide them"
        )
    codes_shape, scales_shape = shapes(format, outputs, inputs)
    codes = torch.zeros(codes_shape, dtype=CODES[format], device=weight_NK.device)
    scales_NG = torch.zeros(scales_shape, dtype=SCALES[format], device=weight_NK.device)
    h_GD = None if importance_K is None else importance_K.float().view(scales_shape[1], -1).clamp_min(1e-12)
    for rows in () if weight_NK.is_meta else _blocks(outputs, inputs):
        w_NGD = weight_NK[rows].float().unflatten(1, (scales_shape[1], -1))
        if not w_NGD.isfinite().all():
            raise ValueError("holds numbers that are not finite")
        scales_NG[rows] = best_scales(w_NGD, h_GD) if format == "int4" else _absmax_scales(w_NGD, format)
        codes[rows] = _codes(w_NGD, scales_NG[rows].float(), format)
    return codes, scales_NG


def dequantize(codes: Tensor, scales_NG: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight [N, K] of codes and scales: their fp32 (for float64, float64) product, rounded to
    `dtype`.
    """
    shape = (codes.shape[0], codes.shape[1] * (2 if format_of(codes) == "int4" else 1))
    weight_NK = torch.empty(shape, dtype=dtype, device=codes.device)
    for rows in _blocks(*shape):
        weight_NK[rows] = _block(codes[rows], scales_NG[rows], dtype)
    return weight_NK


def linear(x: Tensor, codes: Tensor, scales_NG: Tensor) -> Tensor:
    """x [..., K] times the transposed weight, [..., N], in x's dtype.

    The weight is never dequantized as a whole.
    """
    form = choose(x, reference=reference.linear, torch=by_blocks, triton=TRITON)
    y: Tensor = form(x, codes, scales_NG)
    return y


def by_blocks(x: Tensor, codes: Tensor, scales_NG: Tensor) -> Tensor:
    """The torch form of `linear`: dequantizes one block of the weight at a time."""
    parts = [
        F.linear(x, _block(codes[rows], scales_NG[rows], x.dtype))
        for rows in _blocks(codes.shape[0], x.shape[-1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _block(codes: Tensor, scales_NG: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    values_NK = e4m3_to_fp32(codes).to(wide) if format_of(codes) == "fp8" else reference.values(codes, wide)
    values_NGD = values_NK.unflatten(1, (scales_NG.shape[1], -1))
    return values_NGD.mul_(scales_NG.to(wide)[..., None]).flatten(1).to(dtype)


def _absmax_scales(w_NGD: Tensor, format: str) -> Tensor:
    """The scale that maps a group's largest magnitude to the format's largest number."""
    return (w_NGD.abs().amax(-1) / LARGEST[format]).clamp_min_(SMALLEST)


def _codes(w_NGD: Tensor, scales_NG: Tensor, format: str) -> Tensor:
    """The codes nearest to w under scales as they are stored."""
    if format == "int4":
        q = codes_under(w_NGD, 1.0 / scales_NG[..., None]).flatten(1).add_(ZERO).to(torch.uint8)
        return q[:, 0::2] | q[:, 1::2] << 4
    scaled = (w_NGD / scales_NG[..., None]).flatten(1).clamp_(-LARGEST[format], LARGEST[format])
    return scaled.round_().to(torch.int8) if format == "int8" else scaled.to(CODES["fp8"])


def _blocks(outputs: int, inputs: int) -> list[slice]:
    rows = max(1, BLOCK // max(inputs, 1))
    return [slice(begin, min(begin + rows, outputs)) for begin in range(0, outputs, rows)]
