"""A matrix that lies quantized in the files: its tensors, and the rule that turns them into numbers.

Every layout is codes times scales (ops/quantized/formats.py), whatever its tensors are called and however
they are packed. So a layout is a small class: which tensors it has (`parts`), the codes of some rows, and
their scales. The rest follows from these. `decode` makes numbers of them. `packed` makes codes and scales of
one of our formats, where `format` says that there is one with exactly these values; scales are rounded to
the format's dtype.

N outputs, K inputs, G groups of a row, R rows that are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanohybrid.checkpoint.header import FLOATS, Entry
from nanohybrid.errors import CheckpointError
from nanohybrid.ops.fp8.torch import e4m3_to_fp32
from nanohybrid.ops.quantized import CODES, SCALES, group_of
from nanohybrid.ops.quantized.formats import ZERO

PIECE = 1 << 20  # weights that are decoded at once
SMALLEST_GROUP = 16  # of int8 and fp8 that our kernels run; int4 has groups of 32 only


class Files(Protocol):
    """Where the tensors of a matrix are read from."""

    def rows(self, entry: Entry, begin: int, end: int) -> Tensor:
        """Rows [begin, end) along the first axis of a stored tensor, in its own dtype, on the host."""

    def whole(self, entry: Entry) -> Tensor:
        """A whole tensor, which stays in memory until one of another matrix is asked for."""


@dataclass(frozen=True)
class Layout(ABC):
    """A quantized matrix [N, K]. parts: its tensors by the last part of their names."""

    shape: tuple[int, int]
    parts: Mapping[str, Entry]

    @property
    @abstractmethod
    def label(self) -> str:
        """What people call it."""

    @property
    @abstractmethod
    def main(self) -> Entry:
        """The tensor of the codes."""

    @property
    @abstractmethod
    def group(self) -> int:
        """Weights of a row that share a scale; K is a multiple of it."""

    @property
    @abstractmethod
    def wanted(self) -> str | None:
        """Our format with these codes, whatever its groups; None where there is none."""

    @abstractmethod
    def codes(self, files: Files, begin: int, end: int) -> Tensor:
        """Whole numbers, or float8_e4m3fn, [R, K]."""

    @abstractmethod
    def scales(self, files: Files, begin: int, end: int) -> Tensor:
        """[R, G] in fp32."""

    @property
    def format(self) -> str | None:
        """Our format with these numbers in groups that our kernels run; None where there is none."""
        if self.wanted is None:
            return None
        own, power_of_two = group_of(self.wanted, self.shape[1]), self.group & (self.group - 1) == 0
        finer = self.wanted != "int4" and power_of_two and self.group >= SMALLEST_GROUP
        return self.wanted if self.group % own == 0 or finer else None

    @property
    def packed_group(self) -> int:
        """The groups of `packed`: the format's own, or smaller ones where they are stored so."""
        return min(self.group, group_of(self.format or "", self.shape[1]))

    @property
    def bytes(self) -> int:
        """In the files."""
        return sum(entry.end - entry.begin for entry in self.parts.values())

    def decode(self, files: Files, begin: int, end: int) -> Tensor:
        """Rows [begin, end) in fp32: value(code) scale."""
        codes_RK, scales_RG = self.codes(files, begin, end), self.scales(files, begin, end)
        values_RK = e4m3_to_fp32(codes_RK) if codes_RK.dtype == CODES["fp8"] else codes_RK.float()
        return values_RK.unflatten(1, (scales_RG.shape[1], -1)).mul_(scales_RG[..., None]).flatten(1)

    def packed_codes(self, files: Files, begin: int, end: int) -> Tensor:
        """Codes of rows [begin, end) in `format`."""
        codes_RK = self.codes(files, begin, end)
        if self.format != "int4":
            return codes_RK
        bytes_RK = (codes_RK + ZERO).to(torch.uint8)
        return bytes_RK[:, 0::2] | (bytes_RK[:, 1::2] << 4)

    def packed(self, files: Files, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """Codes and scales in `format`, in groups of `packed_group`."""
        assert self.format is not None
        (outputs, inputs), repeat = self.shape, self.group // self.packed_group
        width = inputs // 2 if self.format == "int4" else inputs
        codes = torch.empty((outputs, width), dtype=CODES[self.format], device=device)
        groups = inputs // self.packed_group
        scales_NG = torch.empty((outputs, groups), dtype=SCALES[self.format], device=device)
        if not codes.is_meta:
            for rows in self.pieces():
                codes[rows] = self.packed_codes(files, rows.start, rows.stop).to(device)
                scales_RG = self.scales(files, rows.start, rows.stop)
                scales_NG[rows] = scales_RG.repeat_interleave(repeat, dim=1).to(device)
        return codes, scales_NG

    def pieces(self) -> list[slice]:
        """Rows that are read at once, one piece after another."""
        step = max(1, PIECE // max(self.shape[1], 1))
        return [slice(at, min(at + step, self.shape[0])) for at in range(0, self.shape[0], step)]


@dataclass(frozen=True)
class MatrixEntry(Entry):
    """A quantized matrix among the tensors of a checkpoint: path, name and place are those of its codes,
    dtype is what people call the layout."""

    layout: Layout

    @classmethod
    def of(cls, layout: Layout) -> MatrixEntry:
        main = layout.main
        return cls(main.path, main.name, layout.label, layout.shape, main.begin, main.end, layout)


def wrong(entry: Entry, what: str) -> CheckpointError:
    """An error that names file and tensor."""
    return CheckpointError(f"{entry.path}: {entry.name}: {what}")


def check_part(entry: Entry, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raise CheckpointError where a tensor of a matrix has another type or shape."""
    if entry.shape != shape:
        raise wrong(
            entry, f"is {list(entry.shape)}, but config.json says {list(shape)}; was this checkpoint pruned?"
        )
    if entry.dtype not in dtypes:
        raise wrong(entry, f"is {entry.dtype}; known is {' or '.join(dtypes)}")


def row_scales(codes: Entry, scales: Entry | None, shape: tuple[int, int]) -> tuple[Entry, int]:
    """The tensor of scales of a matrix, of rows, or of groups of a row, and how many there are in a row.

    Raises CheckpointError where there is none, or it has another type or shape.
    """
    if scales is None:
        raise wrong(codes, "has no weight_scale")
    outputs, inputs = shape
    per_row = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == outputs else 1
    known = {(), (1,), (1, 1), (outputs,), (outputs, per_row)}
    if scales.dtype not in FLOATS or scales.shape not in known or per_row < 1 or inputs % per_row:
        raise wrong(scales, f"is {scales.dtype} {list(scales.shape)}, which are no scales of {list(shape)}")
    return scales, per_row


def read_row_scales(files: Files, scales: Entry, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of the tensor that `row_scales` accepts, [R, G] in fp32."""
    if scales.shape in ((), (1,), (1, 1)):
        return files.whole(scales).float().reshape(1, 1).expand(end - begin, 1)
    return files.rows(scales, begin, end).float().reshape(end - begin, -1)
