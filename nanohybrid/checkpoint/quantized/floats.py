"""Floating-point numbers of 8 and 4 bits: FP8 of compressed-tensors, ModelOpt and Qwen, and NVFP4.

    FP8      weight e4m3 [N, K]
             weight_scale of the matrix, of rows, or of blocks [ceil(N / b), ceil(K / c)] (ModelOpt:
             [.., 1, .., 1]); in files of transformers' `fp8` the name is weight_scale_inv, and it is
             multiplied all the same
    NVFP4    two e2m1 codes in a byte, the even column in the low bits: weight uint8 [N, K / 2] with
             weight_scale e4m3 [N, K / 16] and weight_scale_2 fp32 (ModelOpt), or weight_packed, weight_scale
             and weight_global_scale (compressed-tensors)

    w = value(code) weight_scale                     FP8
    w = value(code) weight_scale weight_scale_2      NVFP4 of ModelOpt
    w = value(code) weight_scale / weight_global_scale       of compressed-tensors

Twice an e2m1 number is one of 0, 1, 2, 3, 4, 6, 8, 12 with a sign, so int8 holds NVFP4's codes exactly, in
groups of 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.checkpoint.quantized.matrix import (
    Files,
    Layout,
    check_part,
    read_row_scales,
    row_scales,
    wrong,
)
from nanohybrid.checkpoint.quantized.written import PACKED, PLAIN, SCALE
from nanohybrid.ops.fp8.torch import e4m3_to_fp32

INVERSE = "weight_scale_inv"
SECOND, GLOBAL = "weight_scale_2", "weight_global_scale"
TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
NVFP4_GROUP = 16


@dataclass(frozen=True)
class Fp8Rows(Layout):
    """FP8 with a scale for the matrix, for each row, or for each block of `block` rows and columns."""

    block: tuple[int, int] | None = None

    @classmethod
    def find(
        cls, parts: Mapping[str, Entry], shape: tuple[int, int], block: tuple[int, int] | None
    ) -> Fp8Rows | None:
        """The matrix if its tensors are of this kind; `block` is what config.json says. Raises
        CheckpointError for shapes that do not fit."""
        codes, scales = parts.get(PLAIN), parts.get(SCALE) or parts.get(INVERSE)
        if codes is None or codes.dtype != "F8_E4M3":
            return None
        check_part(codes, ("F8_E4M3",), shape)
        own = {part: parts[part] for part in (PLAIN, SCALE, INVERSE) if part in parts}
        if scales is not None and block is not None and _without_ones(scales) == _blocks(shape, block):
            if scales.dtype not in FLOATS:
                raise wrong(scales, f"is {scales.dtype}; known is {' or '.join(FLOATS)}")
            return cls(shape, own, block)
        if block is not None and scales is not None and scales.shape not in ((), (1,), (shape[0], 1)):
            raise wrong(
                scales,
                f"is {list(scales.shape)}, but blocks of {list(block)} in {list(shape)} are "
                f"{list(_blocks(shape, block))}",
            )
        row_scales(codes, scales, shape)
        return cls(shape, own)

    @property
    def main(self) -> Entry:
        return self.parts[PLAIN]

    @property
    def label(self) -> str:
        return "fp8" if self.block is None else f"FP8 in blocks of {self.block[0]} x {self.block[1]}"

    @property
    def _scales(self) -> Entry:
        return self.parts.get(SCALE) or self.parts[INVERSE]

    @property
    def group(self) -> int:
        inputs = self.shape[1]
        if self.block is None:
            return inputs // row_scales(self.main, self._scales, self.shape)[1]
        return inputs if inputs <= self.block[1] else gcd(inputs, self.block[1])

    @property
    def wanted(self) -> str:
        return "fp8"

    def codes(self, files: Files, begin: int, end: int) -> Tensor:
        return files.rows(self.main, begin, end)

    def scales(self, files: Files, begin: int, end: int) -> Tensor:
        if self.block is None:
            return read_row_scales(files, self._scales, begin, end)
        rows, columns = self.block
        first = begin // rows
        blocks = files.rows(self._scales, first, -(-end // rows)).float().reshape(-(-end // rows) - first, -1)
        row = torch.arange(begin, end) // rows - first
        column = torch.arange(0, self.shape[1], self.group) // columns
        return blocks[row][:, column]


@dataclass(frozen=True)
class Nvfp4Rows(Layout):
    """NVFP4 of ModelOpt or of compressed-tensors."""

    @classmethod
    def find(cls, parts: Mapping[str, Entry], shape: tuple[int, int]) -> Nvfp4Rows | None:
        """The matrix if its tensors are of this kind. Raises CheckpointError for types and shapes that do not
        fit."""
        codes = parts.get(PACKED) or parts.get(PLAIN)
        if codes is None or codes.dtype != "U8":
            return None
        outputs, inputs = shape
        own = {part: parts[part] for part in (PACKED, PLAIN, SCALE, SECOND, GLOBAL) if part in parts}
        if inputs % NVFP4_GROUP:
            raise wrong(codes, f"has rows of {inputs}, which are no multiple of {NVFP4_GROUP}")
        check_part(codes, ("U8",), (outputs, inputs // 2))
        if SCALE not in parts or (SECOND in parts) == (GLOBAL in parts):
            raise wrong(codes, f"has no {SCALE}, or not one of {SECOND} and {GLOBAL}")
        check_part(parts[SCALE], ("F8_E4M3",), (outputs, inputs // NVFP4_GROUP))
        whole = parts.get(SECOND) or parts[GLOBAL]
        check_part(whole, ("F32",), whole.shape if whole.shape in ((), (1,)) else (1,))
        return cls(shape, own)

    @property
    def main(self) -> Entry:
        return self.parts.get(PACKED) or self.parts[PLAIN]

    @property
    def label(self) -> str:
        return "NVFP4"

    @property
    def group(self) -> int:
        return NVFP4_GROUP

    @property
    def wanted(self) -> str:
        return "int8"

    def codes(self, files: Files, begin: int, end: int) -> Tensor:
        stored = files.rows(self.main, begin, end)
        nibbles = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)
        table = torch.tensor([*TWICE_E2M1, *(-twice for twice in TWICE_E2M1)], dtype=torch.int8)
        return table[nibbles.int()]

    def scales(self, files: Files, begin: int, end: int) -> Tensor:
        groups = e4m3_to_fp32(files.rows(self.parts[SCALE], begin, end))
        if SECOND in self.parts:
            return groups * files.whole(self.parts[SECOND]).reshape(()) / 2
        return groups / files.whole(self.parts[GLOBAL]).reshape(()) / 2


def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _without_ones(entry: Entry) -> tuple[int, ...]:
    """The shape of scales of blocks; ModelOpt's have an axis of 1 after each."""
    if len(entry.shape) == 4 and entry.shape[1::2] == (1, 1):
        return entry.shape[0::2]
    return entry.shape
