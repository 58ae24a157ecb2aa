"""Weights laid out for tile.py, once, when a model is prepared: from bfloat16, or from the codes and scales of ops/quantized.

N outputs · K inputs · G groups of K.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

UNIT = 64  # outputs: four panels of 16
LEAST = 32  # K is padded to a multiple of this


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [outputs, inputs] as units of blocks. data: uint8 [units, 4 panels, groups, bytes of a block], so that a
    panel is one run of memory, which prefetchers follow; groups x pairs: how K is cut; width: K with its padding."""

    form: str
    outputs: int
    inputs: int
    width: int
    groups: int
    pairs: int
    data: Tensor
    _records: dict[int, np.ndarray] = field(
        default_factory=dict, repr=False
    )  # by the data's address: a copy has another

    @property
    def units(self) -> int:
        return len(self.data)

    @property
    def fixed_bytes(self) -> int:
        """Of a row of activations made integers for it (executors/cpu/kernels/gemm_int8.py)."""
        return self.groups * (self.pairs + 2) * 4

    def record(self) -> np.ndarray:
        """The words of executors/cpu/kernels/gemm.py's LINEAR."""
        address = self.data.data_ptr()
        if address not in self._records:
            from nanohybrid.executors.cpu.kernels.gemm_tile import FORMS

            words = (self.units, self.groups, self.pairs, self.data.shape[-1], address)
            self._records[address] = np.array(
                [FORMS.index(self.form), self.outputs, self.inputs, self.width, *words], dtype=np.int64
            )
        return self._records[address]


def pack(weight_NK: Tensor, form: str = "bf16", scales_NG: Tensor | None = None) -> Packed:
    """Lay out a weight: bfloat16 [N, K]; or the codes of int8 [N, K] or int4 (uint8 [N, K/2], low nibble first), and their scales.

    Works unit by unit: nothing but the result is ever held. Raises ValueError where the form is unknown.
    """
    outputs = weight_NK.shape[0]
    inputs = weight_NK.shape[1] * (2 if form == "int4" else 1)
    units = -(-outputs // UNIT)
    if form == "bf16":
        width = -(-inputs // LEAST) * LEAST
        groups, pairs, block = width // LEAST, LEAST // 2, LEAST * 32
    elif form in ("int8", "int4") and scales_NG is not None:
        group = inputs // scales_NG.shape[1]
        groups = scales_NG.shape[1]
        pairs = -(-group // 8) * 4  # only a row that is one group can need padding
        width, block = groups * 2 * pairs, 32 + pairs * (32 if form == "int8" else 16)
    else:
        raise ValueError(
            f"a weight of form {form!r} cannot be packed: known are bf16, int8 and int4 with scales"
        )
    data = torch.empty(units, 4, groups, block, dtype=torch.uint8)
    for unit in range(units):
        rows = weight_NK[unit * UNIT : (unit + 1) * UNIT]
        scales = None if scales_NG is None else scales_NG[unit * UNIT : (unit + 1) * UNIT]
        data[unit] = _blocks(
            _padded(rows, UNIT), form, width, groups, None if scales is None else _padded(scales, UNIT)
        )
    return Packed(form, outputs, inputs, width, groups, pairs, data)


def unpack(packed: Packed) -> Tensor:
    """The weight [N, K] that the panels hold, in fp32: what the kernels multiply by, to compare them with."""
    cut = packed.data.flatten(0, 1)  # [panels, groups, bytes of a block]
    if packed.form == "bf16":
        values = (
            cut.contiguous()
            .view(torch.bfloat16)
            .view(len(cut), packed.groups, packed.pairs, 16, 2)
            .permute(0, 3, 1, 2, 4)
        )
        return values.reshape(-1, packed.width)[: packed.outputs, : packed.inputs].float()
    scales = cut[..., :32].contiguous().view(torch.bfloat16).float().transpose(1, 2)  # [panels, 16, G]
    codes, size = cut[..., 32:], 2 * packed.pairs
    if packed.form == "int8":
        values = codes.view(len(cut), packed.groups, size // 4, 16, 4).permute(0, 3, 1, 2, 4).short() - 128
    else:
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(
            len(cut), packed.groups, size // 8, 16, 4, 2
        )
        values = nibbles.permute(0, 3, 1, 2, 5, 4).short() - 8
    weight = values.reshape(len(cut), 16, packed.groups, size).float() * scales[..., None]
    return weight.reshape(-1, packed.width)[: packed.outputs, : packed.inputs]


def matmul(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K] W^T -> [..., N] in `dtype` (None: x's): products of bfloat16, sums in fp32, each row's in one order whatever the
    others are; fp32 gets the sums as they are."""
    from nanohybrid.executors.cpu.kernels import gemm as linear
    from nanohybrid.ops.numba.threads import run, threads

    dtype = x.dtype if dtype is None else dtype
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    full = dtype != torch.bfloat16
    out = torch.empty(len(rows), weight.outputs, dtype=torch.float32 if full else torch.bfloat16)
    most = min(linear.ROWS_AT_ONCE, len(rows)) + 12
    room = torch.empty(most, weight.width, dtype=torch.bfloat16)
    fixed = torch.empty(most if weight.form != "bf16" else 0, weight.fixed_bytes, dtype=torch.uint8)
    if len(rows):
        where = (
            rows.data_ptr(),
            rows.stride(0),
            len(rows),
            room.data_ptr(),
            fixed.data_ptr(),
            int(full),
            out.data_ptr(),
        )
        run(linear.matmul, weight.record(), *where, size=threads(weight.data.numel()))
    return out.view(*x.shape[:-1], weight.outputs).to(dtype)


def _padded(rows: Tensor, count: int) -> Tensor:
    return (
        rows if len(rows) == count else torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
    )


def _blocks(rows: Tensor, form: str, width: int, groups: int, scales: Tensor | None) -> Tensor:
    """[64, K] -> uint8 [4, groups, bytes of a block]."""
    size = width // groups
    if form == "bf16":
        padded = torch.nn.functional.pad(rows.to(torch.bfloat16), (0, width - rows.shape[1]))
        return (
            padded.view(4, 16, groups, size // 2, 2)
            .permute(0, 2, 3, 1, 4)
            .contiguous()
            .view(torch.uint8)
            .flatten(2)
        )
    assert scales is not None
    rows = torch.nn.functional.pad(rows, (0, width // (2 if form == "int4" else 1) - rows.shape[1]))
    heads = scales.to(torch.bfloat16).view(4, 16, groups).transpose(1, 2).contiguous().view(torch.uint8)
    if form == "int8":
        codes = (rows.short() + 128).to(torch.uint8).view(4, 16, groups, size // 4, 4).permute(0, 2, 3, 1, 4)
    else:
        nibbles = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1)  # [64, K], in the order of K
        halves = nibbles.view(4, 16, groups, size // 8, 2, 4).permute(
            0, 2, 3, 4, 1, 5
        )  # [4, groups, K of a group / 8, half, 16, 4]
        codes = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return torch.cat([heads, codes.flatten(2)], dim=-1)
