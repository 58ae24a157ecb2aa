"""Weights packed into the panels of gemm_tile.py, once, when a model is prepared: bfloat16, or codes and
scales of ops/quantized.

N outputs · K inputs · G groups of K.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

UNIT = 64  # outputs: four panels of 16
K_MULTIPLE = 32  # K of bfloat16 is padded to a multiple of this


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [outputs, inputs] as units of blocks.

    format: bf16, int8 or int4. width: K with its padding, groups * pairs * 2. data: uint8 [units, 4 panels,
    groups, bytes of a block]; the blocks of a panel are contiguous, so hardware prefetchers follow them.
    """

    format: str
    outputs: int
    inputs: int
    width: int
    groups: int
    pairs: int
    data: Tensor
    _records: dict[int, np.ndarray] = field(
        default_factory=dict, repr=False
    )  # by address: a copy has another

    @property
    def units(self) -> int:
        return len(self.data)

    @property
    def quantized_row_bytes(self) -> int:
        """Bytes of a row of activations that is quantized for this weight (quantize_rows.py)."""
        return self.groups * (self.pairs + 2) * 4

    def record(self) -> np.ndarray:
        """The words of gemm.LINEAR."""
        address = self.data.data_ptr()
        if address not in self._records:
            from nanohybrid.executors.cpu.kernels.gemm_tile import FORMATS

            words = (self.units, self.groups, self.pairs, self.data.shape[-1], address)
            self._records[address] = np.array(
                [FORMATS.index(self.format), self.outputs, self.inputs, self.width, *words], dtype=np.int64
            )
        return self._records[address]


def pack(weight_NK: Tensor, format: str = "bf16", scales_NG: Tensor | None = None) -> Packed:
    """Pack a weight: bfloat16 [N, K], or the codes of int8 [N, K] or int4 [N, K/2] with their scales.

    int4: uint8, the low nibble first.

    Works unit by unit, so no second copy of the weight is in memory. Raises ValueError where the format is
    unknown, or scales are missing.
    """
    outputs = weight_NK.shape[0]
    inputs = weight_NK.shape[1] * (2 if format == "int4" else 1)
    units = -(-outputs // UNIT)
    if format == "bf16":
        width = -(-inputs // K_MULTIPLE) * K_MULTIPLE
        groups, pairs, block = width // K_MULTIPLE, K_MULTIPLE // 2, K_MULTIPLE * 32
    elif format in ("int8", "int4") and scales_NG is not None:
        group = inputs // scales_NG.shape[1]
        groups = scales_NG.shape[1]
        pairs = -(-group // 8) * 4  # only a row that is one group can need padding
        width, block = groups * 2 * pairs, 32 + pairs * (32 if format == "int8" else 16)
    else:
        raise ValueError(
            f"a weight of format {format!r} cannot be packed: known are bf16, int8 and int4 with scales"
        )
    data = torch.empty(units, 4, groups, block, dtype=torch.uint8)
    for unit in range(units):
        rows = weight_NK[unit * UNIT : (unit + 1) * UNIT]
        scales = None if scales_NG is None else scales_NG[unit * UNIT : (unit + 1) * UNIT]
        data[unit] = _blocks(
            _padded(rows, UNIT), format, width, groups, None if scales is None else _padded(scales, UNIT)
        )
    return Packed(format, outputs, inputs, width, groups, pairs, data)


def unpack(packed: Packed) -> Tensor:
    """The weight [N, K] that the panels hold, in fp32."""
    cut = packed.data.flatten(0, 1)  # [panels, groups, bytes of a block]
    if packed.format == "bf16":
        values = (
            cut.contiguous()
            .view(torch.bfloat16)
            .view(len(cut), packed.groups, packed.pairs, 16, 2)
            .permute(0, 3, 1, 2, 4)
        )
        return values.reshape(-1, packed.width)[: packed.outputs, : packed.inputs].float()
    scales = cut[..., :32].contiguous().view(torch.bfloat16).float().transpose(1, 2)  # [panels, 16, G]
    codes, size = cut[..., 32:], 2 * packed.pairs
    if packed.format == "int8":
        values = codes.view(len(cut), packed.groups, size // 4, 16, 4).permute(0, 3, 1, 2, 4).short() - 128
    else:
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(
            len(cut), packed.groups, size // 8, 16, 4, 2
        )
        values = nibbles.permute(0, 3, 1, 2, 5, 4).short() - 8
    weight = values.reshape(len(cut), 16, packed.groups, size).float() * scales[..., None]
    return weight.reshape(-1, packed.width)[: packed.outputs, : packed.inputs]


def matmul(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K] W^T -> [..., N] in `dtype` (None: x's dtype).

    x is rounded to bfloat16; sums are fp32, and not rounded where `dtype` is fp32. A row's bits do not depend
    on the others.
    """
    from nanohybrid.executors.cpu.kernels import gemm
    from nanohybrid.ops.numba.threads import num_threads, run

    dtype = x.dtype if dtype is None else dtype
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    full = dtype != torch.bfloat16
    out = torch.empty(len(rows), weight.outputs, dtype=torch.float32 if full else torch.bfloat16)
    count = min(gemm.MAX_ROWS, len(rows)) + 12
    scratch = torch.empty(count, weight.width, dtype=torch.bfloat16)
    quantized_count = 0 if weight.format == "bf16" else count
    quantized = torch.empty(quantized_count, weight.quantized_row_bytes, dtype=torch.uint8)
    if len(rows):
        args = (
            rows.data_ptr(),
            rows.stride(0),
            len(rows),
            scratch.data_ptr(),
            quantized.data_ptr(),
            int(full),
            out.data_ptr(),
        )
        run(gemm.matmul, weight.record(), *args, size=num_threads(weight.data.numel()))
    return out.view(*x.shape[:-1], weight.outputs).to(dtype)


def _padded(rows: Tensor, count: int) -> Tensor:
    """With zeros after the last row, to `count` rows."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _blocks(rows: Tensor, format: str, width: int, groups: int, scales: Tensor | None) -> Tensor:
    """[64, K] -> uint8 [4, groups, bytes of a block]."""
    size = width // groups
    if format == "bf16":
        padded = torch.nn.functional.pad(rows.to(torch.bfloat16), (0, width - rows.shape[1]))
        return (
            padded.view(4, 16, groups, size // 2, 2)
            .permute(0, 2, 3, 1, 4)
            .contiguous()
            .view(torch.uint8)
            .flatten(2)
        )
    assert scales is not None
    rows = torch.nn.functional.pad(rows, (0, width // (2 if format == "int4" else 1) - rows.shape[1]))
    scale_bytes = scales.to(torch.bfloat16).view(4, 16, groups).transpose(1, 2).contiguous().view(torch.uint8)
    if format == "int8":
        codes = (rows.short() + 128).to(torch.uint8).view(4, 16, groups, size // 4, 4).permute(0, 2, 3, 1, 4)
    else:
        nibbles = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1)  # [64, K], in the order of K
        # [4, groups, K of a group / 8, half, 16, 4]
        halves = nibbles.view(4, 16, groups, size // 8, 2, 4).permute(0, 2, 3, 4, 1, 5)
        codes = halves[..., 0, :, :] | (halves[..., 1, :, :] << 4)
    return torch.cat([scale_bytes, codes.flatten(2)], dim=-1)
