"""4- and 8-bit integers in columns: the older layouts of GPTQ and AWQ, where rows are inputs.

    GPTQ    qweight int32 [K bits / 32, N]: a word holds 32 / bits inputs of an output, the lowest bits first
            qzeros int32 [K / group, N bits / 32]: zero points of neighboring outputs, less 1 (`gptq`), or as
            they are (`gptq_v2`)
            scales [K / group, N]; g_idx int32 [K]: the group of each input
    AWQ     qweight int32 [K, N / 8], qzeros int32 [K / group, N / 8]: of eight neighboring outputs in the
            order 0, 2, 4, 6, 1, 3, 5, 7; scales [K / group, N]

    w[n, k] = (qweight[k, n] - zero point[k // group, n]) scale[k // group, n]

`g_idx` must be k // group; inputs in another order (act order) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.checkpoint.quantized.matrix import Files, Layout, check_part, wrong
from nanohybrid.ops.quantized import group_of

WEIGHT, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Columns(Layout):
    """bits: of a number. awq: whether the tensors are AWQ's. symmetric: whether config.json says that every
    zero point is the middle. zero_offset: what is added to GPTQ's zero points."""

    bits: int = 4
    awq: bool = False
    symmetric: bool = False
    zero_offset: int = 1

    @classmethod
    def find(
        cls,
        parts: Mapping[str, Entry],
        shape: tuple[int, int],
        bits: int,
        awq: bool,
        symmetric: bool,
        zero_offset: int,
    ) -> Columns | None:
        """The matrix if its tensors are of this kind; the other arguments are what config.json says. Raises
        CheckpointError for types and shapes that do not fit."""
        codes = parts.get(WEIGHT)
        if codes is None:
            return None
        for part in (ZEROS, SCALES):
            if part not in parts:
                raise wrong(codes, f"has no {part}")
        (outputs, inputs), per_word = shape, WORD // bits
        groups = parts[SCALES].shape[0] if parts[SCALES].shape else 0
        if groups < 1 or inputs % groups or inputs % per_word or outputs % per_word:
            raise wrong(
                parts[SCALES], f"is {list(parts[SCALES].shape)}, which are no scales of {list(shape)}"
            )
        check_part(codes, ("I32",), (inputs, outputs // per_word) if awq else (inputs // per_word, outputs))
        check_part(parts[ZEROS], ("I32",), (groups, outputs // per_word))
        check_part(parts[SCALES], tuple(FLOATS), (groups, outputs))
        if ORDER in parts:
            check_part(parts[ORDER], ("I32",), (inputs,))
        own = {part: parts[part] for part in (WEIGHT, ZEROS, SCALES, ORDER) if part in parts}
        return cls(shape, own, bits, awq, symmetric, zero_offset)

    @property
    def main(self) -> Entry:
        return self.parts[WEIGHT]

    @property
    def label(self) -> str:
        return "AWQ" if self.awq else f"GPTQ in {self.bits} bits"

    @property
    def group(self) -> int:
        return self.shape[1] // self.parts[SCALES].shape[0]

    @property
    def wanted(self) -> str | None:
        if self.symmetric:
            fits = self.bits == 8 or self.group % group_of("int4", self.shape[1]) == 0
            return f"int{self.bits}" if fits else "int8"
        return "int8" if self.bits == 4 else None

    def codes(self, files: Files, begin: int, end: int) -> Tensor:
        self._check_order(files)
        per_word, mask = WORD // self.bits, (1 << self.bits) - 1
        words = files.whole(self.main)
        if self.awq:
            first = begin // per_word
            columns = _outputs(words[:, first : -(-end // per_word)], self.bits, AWQ_ORDER)
            numbers_KR = columns[:, begin - first * per_word : end - first * per_word]
        else:
            shifts = torch.arange(0, WORD, self.bits, dtype=torch.int32)
            numbers_KR = ((words[:, None, begin:end] >> shifts[:, None]) & mask).flatten(0, 1)
        zeros_GR = self._zero_points(files)[:, begin:end]
        codes_KR = numbers_KR - zeros_GR.repeat_interleave(self.group, dim=0)
        narrow = self.bits == 4 or self.symmetric
        return codes_KR.T.contiguous().to(torch.int8 if narrow else torch.int16)

    def scales(self, files: Files, begin: int, end: int) -> Tensor:
        return files.whole(self.parts[SCALES])[:, begin:end].T.float()

    def _zero_points(self, files: Files) -> Tensor:
        """[G, N] in int32."""
        words, order = files.whole(self.parts[ZEROS]), AWQ_ORDER if self.awq else None
        zeros_GN = _outputs(words, self.bits, order)
        if not self.awq:
            zeros_GN = (zeros_GN + self.zero_offset) & ((1 << self.bits) - 1)
        if self.symmetric and not bool((zeros_GN == 1 << (self.bits - 1)).all()):
            raise wrong(self.parts[ZEROS], "has other zero points than the middle, but config.json says sym")
        return zeros_GN

    def _check_order(self, files: Files) -> None:
        if ORDER in self.parts:
            order = files.whole(self.parts[ORDER])
            if not torch.equal(order.long(), torch.arange(self.shape[1]) // self.group):
                raise wrong(
                    self.parts[ORDER],
                    "columns in the order of their activations (desc_act) are not read; take a file without",
                )


def _outputs(words: Tensor, bits: int, order: tuple[int, ...] | None) -> Tensor:
    """The numbers of words [rows, N bits / 32] as int32 [rows, N]; order: the output of each, from the lowest
    bits up."""
    places = torch.arange(WORD // bits) if order is None else torch.tensor(order).argsort()
    shifts = (places * bits).to(torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
