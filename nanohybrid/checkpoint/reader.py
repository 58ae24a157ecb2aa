"""Reading a checkpoint tensor by tensor: every file's head is checked when it is opened, no weight is read before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nanohybrid.checkpoint.dialects import load_config
from nanohybrid.checkpoint.header import FLOATS, TYPES, WIDTHS, Entry, read_header, shown
from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.checkpoint.match import INDEX, SINGLE, Quantized, match
from nanohybrid.checkpoint.names import EMBEDDINGS, is_ignored
from nanohybrid.checkpoint.quantization import is_quantized
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError
from nanohybrid.estimate import Footprint
from nanohybrid.ops import quantized

PIECE = 16 * 2**20  # bytes read at once where the type or device changes on the way


class CheckpointReader:
    """A checkpoint directory whose heads are sound and complete: every tensor of the model is there, of its shape, and no other.

    `names()` are the model's own (`backbone.layers.0...`) whatever the files say. Raises CheckpointError or ConfigError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._quantized: dict[str, Quantized]
        self.config: HybridConfig = load_config(self.directory)
        matched = match(
            self.directory, _open_headers(self.directory), self.config, is_quantized(self.directory)
        )
        self._entries, self._quantized, self._head_copy = matched.plain, matched.quantized, matched.head_copy
        self._file: tuple[Path, BinaryIO] | None = None

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard that was read last."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def names(self) -> list[str]:
        """The tensors in the order in which they lie on the disk, which is the quickest to read them in."""
        first = self._entries | {name: matrix.codes for name, matrix in self._quantized.items()}
        return sorted(first, key=lambda name: (first[name].path, first[name].begin))

    @property
    def formats(self) -> dict[str, str]:
        """The format of each matrix that is quantized: `codes` reads it, and nothing else does."""
        return {name: matrix.format for name, matrix in self._quantized.items()}

    @property
    def format(self) -> str | None:
        """The format of the quantized matrices, that of most of them; None where there are none."""
        found = list(self.formats.values())
        return max(set(found), key=found.count) if found else None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._quantized[name].shape if name in self._quantized else self._entries[name].shape

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        parts = [part for matrix in self._quantized.values() for part in (matrix.codes, matrix.scales)]
        return sum(entry.end - entry.begin for entry in (*self._entries.values(), *parts))

    def held_bytes(self, dtype: torch.dtype | None = None, format: str | None = None) -> int:
        """Bytes of the weights as `load` gives them: in `dtype` (None: as stored), the matrices in a format where one is given.

        Quantized matrices stay as they are, and all the rest counts as stored beside them.
        """
        if self.format is not None:
            return self.stored_bytes
        return Footprint.of(self.config, dtype or self.common_dtype, format=format).weight_bytes

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the tensor is stored. Raises CheckpointError for a quantized one."""
        return FLOATS[self._plain(name).dtype]

    @property
    def common_dtype(self) -> torch.dtype:
        """The type in which most bytes are stored that are not quantized."""
        size = {
            name: sum(e.end - e.begin for e in self._entries.values() if e.dtype == name) for name in FLOATS
        }
        return FLOATS[max(FLOATS, key=size.__getitem__)]

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Read one tensor; dtype None keeps the stored one."""
        target = torch.empty(self._plain(name).shape, dtype=dtype or self.dtype(name), device=device)
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Read one tensor into contiguous memory of its shape, of any type and device; needs at most 16 MiB beside it."""
        if not target.is_meta:
            with _disk_errors(self._plain(name)):
                self._copy(self._entries[name], target.detach().view(-1))

    def rows(self, name: str, device: str | torch.device = "cpu") -> StoredRows:
        """A matrix as it is stored, some rows at a time. Raises CheckpointError for a quantized one."""
        return StoredRows(self, self._plain(name), torch.device(device))

    def codes(self, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Codes and scales of a quantized matrix, in our formats (ops/quantized/formats.py), scales in their types."""
        matrix = self._quantized[name]
        codes, scales = (self._whole(entry, device) for entry in (matrix.codes, matrix.scales))
        if (
            matrix.codes.dtype == "I32"
        ):  # words of several codes: the bytes as they lie; eight bits count from 128
            codes = codes.view(torch.uint8)
            codes = codes if matrix.format == "int4" else codes.bitwise_xor_(0x80).view(torch.int8)
        return codes, quantized.spread(scales, matrix.format, *matrix.shape)

    def _whole(self, entry: Entry, device: str | torch.device) -> Tensor:
        target = torch.empty(entry.shape, dtype=TYPES[entry.dtype], device=device)
        if not target.is_meta:
            with _disk_errors(entry):
                self._copy(entry, target.view(-1))
        return target

    def _plain(self, name: str) -> Entry:
        if name in self._quantized:
            raise CheckpointError(
                f"{self.directory}: is quantized ({self._quantized[name].format}): this needs the checkpoint that it was made from"
            )
        return self._entries[name]

    def check_tied_head(self) -> None:
        """Where the head is the embeddings and the files hold a copy of it all the same, the two must agree."""
        if self._head_copy is None:
            return
        here, copy = self._entries[EMBEDDINGS], self._head_copy
        rows = max(1, PIECE // (here.shape[1] * WIDTHS[here.dtype]))
        for begin in range(0, here.shape[0], rows):
            end = min(begin + rows, here.shape[0])
            ours, theirs = (self.some_rows(entry, begin, end) for entry in (here, copy))
            if not torch.equal(ours, theirs):
                raise CheckpointError(
                    f"{copy.path}: {copy.name}: differs from {here.name}, to which config.json ties it; which of the two is wrong?"
                )

    def some_rows(self, entry: Entry, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of a stored matrix, on the host."""
        row = (entry.end - entry.begin) // entry.shape[0]
        part = Entry(
            entry.path,
            entry.name,
            entry.dtype,
            (end - begin, entry.shape[1]),
            entry.begin + begin * row,
            entry.begin + end * row,
        )
        target = torch.empty(part.shape, dtype=FLOATS[part.dtype])
        with _disk_errors(entry):
            self._copy(part, target.view(-1))
        return target

    def _copy(self, entry: Entry, target: Tensor) -> None:
        file, dtype = self._open(entry.path), TYPES[entry.dtype]
        file.seek(entry.begin)
        if target.dtype == dtype and target.device.type == "cpu":
            _fill(file, target, entry)
            return
        count = max(1, PIECE // dtype.itemsize)
        buffer = torch.empty(min(count, target.numel()), dtype=dtype)
        for begin in range(0, target.numel(), count):
            piece = buffer[: min(count, target.numel() - begin)]
            _fill(file, piece, entry)
            target[begin : begin + len(piece)].copy_(piece)

    def _open(self, path: Path) -> BinaryIO:
        if self._file is None or self._file[0] != path:
            self.close()
            self._file = (path, open(path, "rb", buffering=0))  # noqa: SIM115  kept open until another shard is read
        return self._file[1]


@dataclass(frozen=True)
class StoredRows:
    """A matrix on the disk, to be asked for slices of its rows: what `quantize` reads (ops/quantized/torch.py)."""

    reader: CheckpointReader
    entry: Entry
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def __getitem__(self, rows: slice) -> Tensor:
        return self.reader.some_rows(self.entry, *rows.indices(self.shape[0])[:2]).to(self.device)


def _fill(file: BinaryIO, target: Tensor, entry: Entry) -> None:
    memory = target.view(torch.uint8).numpy().data
    while memory:
        got = file.readinto(memory)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(
                f"{entry.path}: {entry.name}: the file ends inside it; is it being written to?"
            )
        memory = memory[got:]


@contextmanager
def _disk_errors(entry: Entry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{entry.path}: {entry.name}: cannot be read ({error.strerror})") from None


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, or what should be some, beside its configuration."""
    return any((directory / name).exists() for name in (SINGLE, INDEX)) or any(
        directory.glob("*.safetensors")
    )


def _open_headers(directory: Path) -> dict[str, Entry]:
    """The tensors of all weight files by the names on disk."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return read_header(single)
    if index.exists():
        return _open_index(index)
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if not shards:
        raise CheckpointError(f"{directory}: has no {SINGLE} and no {INDEX}: where are the weights?")
    if len(shards) == 1 and re.fullmatch(r"model-0*1-of-0*1\.safetensors", shards[0].name):
        return read_header(shards[0])
    raise CheckpointError(
        f"{index}: no such file, and {shards[0].name} is one of several; copy it from where the shards came"
    )


def _open_index(index: Path) -> dict[str, Entry]:
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index}: has no weight_map, the table of which file holds which tensor")
    for name, file in where.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            raise CheckpointError(
                f"{index}: {shown(name)}: its file is {str(file)[:80]!r}, which is not a *.safetensors beside the index"
            )
        if not (index.parent / file).exists():
            raise CheckpointError(
                f"{index.parent / file}: no such file, and the index says it holds weights; is the download complete?"
            )
    entries: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        for name, entry in read_header(index.parent / file).items():
            if where.get(name) == file:
                entries[name] = entry
            elif not is_ignored(name):
                raise CheckpointError(
                    f"{index.parent / file}: {shown(name)}: the index {_elsewhere(where.get(name))}; are the files of one set?"
                )
    for name, file in where.items():
        if name not in entries:
            raise CheckpointError(
                f"{index.parent / file}: {shown(name)}: is not in the file, and the index says it is"
            )
    return entries


def _elsewhere(file: object) -> str:
    return "does not list it" if file is None else f"says it is in {file}"
