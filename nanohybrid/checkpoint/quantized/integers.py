"""Whole numbers of 8 and 4 bits in rows: the layouts of compressed-tensors.

    naive-quantized, int-quantized   weight int8 [N, K]
    pack-quantized                   weight_packed int32 [N, ceil(K bits / 32)], the lowest bits first, each
                                     number plus 2^(bits - 1); weight_shape [2]
    both                             weight_scale: of the matrix, of rows [N, 1], or of groups [N, G]
    asymmetric                       weight_zero_point: int8 [N, G], or in words int32 [ceil(N bits / 32), G]

    w = (code - zero point) scale

Four bits with zero points have whole numbers from -15 to 15, so int8 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.checkpoint.header import Entry
from nanohybrid.checkpoint.quantized.matrix import (
    Files,
    Layout,
    check_part,
    read_row_scales,
    row_scales,
    wrong,
)
from nanohybrid.checkpoint.quantized.written import PACKED, PLAIN, SCALE, SHAPE, SIGN_BIT
from nanohybrid.ops.quantized import group_of

ZERO_POINT = "weight_zero_point"
ORDER = "weight_g_idx"
WORD = 32


@dataclass(frozen=True)
class IntegerRows(Layout):
    """bits: of a number, 8 or 4; of an int8 tensor, or of words."""

    bits: int = 8

    @classmethod
    def find(cls, parts: Mapping[str, Entry], shape: tuple[int, int]) -> IntegerRows | None:
        """The matrix if its tensors are of this kind. Raises CheckpointError for types and shapes that do not
        fit."""
        codes = parts.get(PACKED) or parts.get(PLAIN)
        if codes is None or codes.dtype not in ("I8", "I32"):
            return None
        if ORDER in parts:
            raise wrong(
                parts[ORDER],
                "columns in the order of their activations are not read; take a file with actorder null or "
                "static",
            )
        outputs, inputs = shape
        words8, words4 = (-(-inputs * bits // WORD) for bits in (8, 4))
        bits = 4 if codes.dtype == "I32" and codes.shape != (outputs, words8) else 8
        if codes.dtype == "I32" and codes.shape[-1:] not in ((words8,), (words4,)):
            check_part(codes, ("I32",), (outputs, words4))
        check_part(
            codes,
            (codes.dtype,),
            (outputs, {"I8": inputs, "I32": words4 if bits == 4 else words8}[codes.dtype]),
        )
        if bits == 4 and inputs % 2:
            raise wrong(codes, f"has rows of {inputs}, and 4-bit numbers are read in pairs")
        own = {part: parts[part] for part in (PACKED, PLAIN, SCALE, SHAPE, ZERO_POINT) if part in parts}
        found = cls(shape, own, bits)
        _, groups = row_scales(codes, parts.get(SCALE), shape)
        if ZERO_POINT in parts:
            rows = -(-outputs * bits // WORD) if codes.dtype == "I32" else outputs
            check_part(parts[ZERO_POINT], (codes.dtype,), (rows, groups))
        return found

    @property
    def main(self) -> Entry:
        return self.parts.get(PACKED) or self.parts[PLAIN]

    @property
    def label(self) -> str:
        if ZERO_POINT in self.parts:
            return f"{self.bits}-bit integers with zero points"
        name = f"int{self.bits}"
        return (
            name if self.group % group_of(name, self.shape[1]) == 0 else f"{name} in groups of {self.group}"
        )

    @property
    def group(self) -> int:
        return self.shape[1] // row_scales(self.main, self.parts[SCALE], self.shape)[1]

    @property
    def wanted(self) -> str | None:
        if ZERO_POINT in self.parts:
            return "int8" if self.bits == 4 else None
        if self.bits == 4 and self.group % group_of("int4", self.shape[1]):
            return "int8"
        return f"int{self.bits}"

    def codes(self, files: Files, begin: int, end: int) -> Tensor:
        stored = files.rows(self.main, begin, end)
        inputs, offset = self.shape[1], 1 << (self.bits - 1)
        if self.main.dtype == "I8":
            signed = stored
        elif self.bits == 8:
            signed = (stored.view(torch.uint8) ^ SIGN_BIT).view(torch.int8)[:, :inputs]
        else:
            nibbles = stored.view(torch.uint8)
            signed = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)[:, :inputs].to(torch.int8)
            signed -= offset
        if ZERO_POINT not in self.parts:
            return signed
        zeros_RG = self._zero_points(files, begin, end)
        wide_RK = signed.to(torch.int16) - zeros_RG.repeat_interleave(self.group, dim=1)
        return wide_RK.to(torch.int8) if self.bits == 4 else wide_RK

    def _zero_points(self, files: Files, begin: int, end: int) -> Tensor:
        """[R, G], with the offset of the numbers taken off."""
        zeros = self.parts[ZERO_POINT]
        if zeros.dtype == "I8":
            return files.rows(zeros, begin, end).to(torch.int16)
        per_word = WORD // self.bits
        words = files.rows(zeros, begin // per_word, -(-end // per_word))
        shifts = torch.arange(0, WORD, self.bits, dtype=torch.int32)
        numbers = (words[:, None] >> shifts[:, None]) & ((1 << self.bits) - 1)
        first = begin - begin % per_word
        return (numbers.flatten(0, 1)[begin - first : end - first] - (1 << (self.bits - 1))).to(torch.int16)

    def scales(self, files: Files, begin: int, end: int) -> Tensor:
        return read_row_scales(files, self.parts[SCALE], begin, end)

    def packed_codes(self, files: Files, begin: int, end: int) -> Tensor:
        if self.format == "int4" and self.shape[1] % 8 == 0:  # the words are our bytes
            return files.rows(self.main, begin, end).view(torch.uint8)
        return super().packed_codes(files, begin, end)
