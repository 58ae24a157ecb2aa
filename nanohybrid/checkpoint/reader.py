"""Reading of checkpoints tensor by tensor: directories of safetensors files, and GGUF files.

The headers of all files are checked on opening; weights are read on demand. What is particular to GGUF is in
gguf_source.py.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nanohybrid.checkpoint import gguf_source
from nanohybrid.checkpoint.dialects import load_config
from nanohybrid.checkpoint.gguf_source import BlockEntry
from nanohybrid.checkpoint.header import FLOATS, TYPES, WIDTHS, Entry, read_header, shown
from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.checkpoint.match import INDEX, SINGLE, match
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, is_ignored
from nanohybrid.checkpoint.quantized.matrix import MatrixEntry
from nanohybrid.checkpoint.quantized.settings import read_settings
from nanohybrid.checkpoint.quantized.told import told_of_matrices
from nanohybrid.checkpoint.source import resolve
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.files import open_regular
from nanohybrid.gguf import is_gguf, open_gguf
from nanohybrid.model.quantized import check_format, quantized_names
from nanohybrid.ops import quantized

CHUNK_BYTES = 16 * 2**20  # buffer size where the type or the device of a tensor changes


class CheckpointReader:
    """An open checkpoint: a directory, or a GGUF file. On opening, all files must have valid headers, and
    exactly the tensors of the model.

    Names are those of the model (`backbone.layers.0...`), whatever the files use. Every matrix can be read as
    numbers, however it is quantized. `formats` and, for GGUF files, `packable` say which of them can be read
    as codes too. Raises CheckpointError or ConfigError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = resolve(directory)
        self.config: HybridConfig = load_config(self.directory)
        self.packable: dict[str, str] = {}
        """The matrices of a GGUF file that `packed` reads, and the format of each."""
        self._matrix_dtype: torch.dtype | None = None  # of all matrices of a GGUF file
        if is_gguf(self.directory):
            self._entries = gguf_source.entries(open_gguf(self.directory), self.config)
            self._head_copy = None
            self.packable = gguf_source.packable(self._entries, self.config)
            self._matrix_dtype = gguf_source.matrix_dtype(self._entries)
        else:
            found = _open_headers(self.directory, self.config.tie_word_embeddings)
            matched = match(self.directory, found, self.config, read_settings(self.directory))
            self._entries, self._head_copy = matched.tensors, matched.head_copy
        self._matrices = {n: e.layout for n, e in self._entries.items() if isinstance(e, MatrixEntry)}
        self._file: tuple[Path, BinaryIO] | None = None
        self._files = _MatrixFiles(self)
        self._has_told = False

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def names(self) -> list[str]:
        """The tensors in the order of the files, in which reading is fastest."""
        return sorted(self._entries, key=lambda name: (self._entries[name].path, self._entries[name].begin))

    @property
    def formats(self) -> dict[str, str]:
        """Our format of each quantized matrix that `codes` reads; other layouts become numbers."""
        return {name: layout.format for name, layout in self._matrices.items() if layout.format is not None}

    @property
    def layouts(self) -> dict[str, str]:
        """What each quantized matrix is called in the world: int8, FP8 in blocks of 128 x 128, NVFP4 ..."""
        return {name: layout.label for name, layout in self._matrices.items()}

    @property
    def format(self) -> str | None:
        """The most frequent format of the quantized matrices; None if there are none."""
        found = list(self.formats.values())
        return max(set(found), key=found.count) if found else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a quantized matrix [out, in]."""
        return self._entries[name].shape

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(map(_bytes, self._entries.values()))

    def stored_bytes_of(self, name: str) -> int:
        """Bytes of a tensor in the files; of a tied head's copy too."""
        copies = [self._head_copy] if name == EMBEDDINGS and self._head_copy is not None else []
        return sum(map(_bytes, (self._entries[name], *copies)))

    def weight_bytes(self, dtype: torch.dtype | None = None, format: str | None = None) -> int:
        """Bytes of the weights after `load` with this dtype (None: as stored) and quantization format."""
        chosen, unchanged, formats = self.to_quantize(format), self.unchanged(dtype, format), self.formats
        total = 0
        for name in self.names():
            shape = self.shape(name)
            if name in unchanged:
                total += gguf_source.packed_bytes(unchanged[name], shape[0], shape[1])
            elif name in chosen and format is not None:
                total += quantized.stored_bytes(format, shape[0], shape[1])
            elif name in formats:
                layout = self._matrices[name]
                groups = shape[1] // layout.packed_group
                total += quantized.stored_bytes(formats[name], shape[0], shape[1], groups)
            else:
                total += prod(shape) * (dtype or self.dtype(name)).itemsize
        return total

    def to_quantize(self, format: str | None) -> set[str]:
        """The matrices that `load` quantizes to `format`, those in 8-bit formats among them. Where the files
        have it already, only a head that they left plain.

        Raises InputError where the files have 4-bit codes of ours and not this format, or it is unknown.
        """
        if format is None:
            return set()
        check_format(format)
        stored = set(self.formats.values())
        if "int4" in stored and format not in stored:
            raise InputError(
                f"{self.directory}: is quantized already ({', '.join(sorted(stored))}), so it cannot be "
                f"quantized to {format}"
            )
        chosen = set(quantized_names(self.config, format))
        return chosen & {HEAD} - self.formats.keys() if format in stored else chosen

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is read where none is asked for: as stored.

        All matrices of a GGUF file have one type, bfloat16 where any of them is in blocks. Quantized matrices
        of other files have the common type.
        """
        entry = self._entries[name]
        return self.common_dtype if isinstance(entry, MatrixEntry) else self._read_dtype(entry)

    def _read_dtype(self, entry: Entry) -> torch.dtype:
        matrix = len(entry.shape) == 2
        return self._matrix_dtype if matrix and self._matrix_dtype is not None else FLOATS[entry.dtype]

    @property
    def common_dtype(self) -> torch.dtype:
        """The type of most bytes that are not quantized."""
        count = dict.fromkeys(FLOATS.values(), 0)
        for entry in self._entries.values():
            if isinstance(entry, MatrixEntry):
                continue
            dtype = self._read_dtype(entry)
            count[dtype] += prod(entry.shape) * dtype.itemsize
        return max(count, key=count.__getitem__)

    @property
    def kinds(self) -> dict[str, int]:
        """The types of the tensors as the files call them, and how many tensors have each."""
        return dict(Counter(entry.dtype for entry in self._entries.values()))

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Read one tensor as numbers; dtype None is that of `dtype`."""
        target = torch.empty(self.shape(name), dtype=dtype or self.dtype(name), device=device)
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Read one tensor into a contiguous tensor of its shape, of any type and device, with at most 16 MiB
        of buffer."""
        if not target.is_meta:
            with _disk_errors(self._entries[name]):
                self._copy(self._entries[name], target.detach().view(-1))

    def rows(self, name: str, device: str | torch.device = "cpu") -> StoredRows:
        """A matrix, to be read some rows at a time as numbers."""
        return StoredRows(self, self._entries[name], torch.device(device))

    def codes(self, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix in `formats` (ops/quantized/formats.py); groups may be smaller than
        the format's own."""
        with _disk_errors(self._entries[name]):
            return self._matrices[name].packed(self._files, device)

    def unchanged(self, dtype: torch.dtype | None, quantize: str | None) -> dict[str, str]:
        """The matrices of a GGUF file whose codes `load` takes as they are, and the format of each: those in
        `packable`, where no dtype and no other format is asked for.
        """
        if dtype is not None and quantize is None:
            return {}
        return {name: own for name, own in self.packable.items() if quantize in (None, own)}

    def told(
        self, unchanged: Mapping[str, str], dtype: torch.dtype | None, quantize: str | None
    ) -> str | None:
        """One line on what becomes of the quantized matrices of other programs; None where all stay what they
        are.

        unchanged: the matrices of a GGUF file whose codes are taken. dtype, quantize: as given to `load`.
        """
        self._has_told = True
        if self._matrix_dtype is None:
            chosen = dict.fromkeys(self.to_quantize(quantize), quantize or "")
            line = told_of_matrices(self._matrices, chosen, dtype or self.common_dtype)
            return f"{self.directory.name}: {line}" if line else None
        matrices = {name: entry for name, entry in self._entries.items() if len(entry.shape) == 2}
        formats = dict.fromkeys(self.to_quantize(quantize), quantize or "") | dict(unchanged)
        line = gguf_source.told(matrices, formats, unchanged.keys(), dtype or self._matrix_dtype)
        return f"{self.directory.name}: {line}" if line else None

    def packed(self, name: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix in `packable`, the codes as they are in the GGUF file."""
        entry = self._entries[name]
        with _disk_errors(entry):
            codes, scales = gguf_source.codes_and_scales(self._open(entry.path), entry)
        return codes.to(device), scales.to(device)

    def check_tied_head(self) -> None:
        """Raise CheckpointError where the head is tied to the embeddings but the files have a different copy
        of it."""
        if self._head_copy is None:
            return
        here, copy = self._entries[EMBEDDINGS], self._head_copy
        rows = max(1, CHUNK_BYTES // (here.shape[1] * WIDTHS[here.dtype]))
        for begin in range(0, here.shape[0], rows):
            end = min(begin + rows, here.shape[0])
            ours, theirs = (self.read_rows(entry, begin, end) for entry in (here, copy))
            if not torch.equal(ours, theirs):
                raise CheckpointError(
                    f"{copy.path}: {copy.name}: differs from {here.name}, to which config.json ties it"
                )

    def read_rows(self, entry: Entry, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a stored tensor, on the host; those of quantized matrices and of a GGUF file's
        blocks in fp32."""
        if isinstance(entry, MatrixEntry):
            with _disk_errors(entry):
                return entry.layout.decode(self._files, begin, end)
        if isinstance(entry, BlockEntry):
            with _disk_errors(entry):
                return torch.cat(list(gguf_source.decoded(self._open(entry.path), entry, begin, end)))
        row = (entry.end - entry.begin) // max(entry.shape[0], 1)
        place = (entry.begin + begin * row, entry.begin + end * row)
        part = Entry(entry.path, entry.name, entry.dtype, (end - begin, *entry.shape[1:]), *place)
        target = torch.empty(part.shape, dtype=TYPES[part.dtype])
        with _disk_errors(entry):
            self._copy(part, target.view(-1))
        return target

    def _copy(self, entry: Entry, target: Tensor) -> None:
        if isinstance(entry, BlockEntry):
            self._decode(entry, target)
            return
        if isinstance(entry, MatrixEntry):
            at = target.view(entry.shape)
            for rows in entry.layout.pieces():
                at[rows].copy_(entry.layout.decode(self._files, rows.start, rows.stop))
            return
        file, dtype = self._open(entry.path), TYPES[entry.dtype]
        file.seek(entry.begin)
        if target.dtype == dtype and target.device.type == "cpu":
            _fill(file, target, entry)
            return
        count = max(1, CHUNK_BYTES // dtype.itemsize)
        buffer = torch.empty(min(count, target.numel()), dtype=dtype)
        for begin in range(0, target.numel(), count):
            chunk = buffer[: min(count, target.numel() - begin)]
            _fill(file, chunk, entry)
            target[begin : begin + len(chunk)].copy_(chunk)

    def _decode(self, entry: BlockEntry, target: Tensor) -> None:
        if not self._has_told and target.dtype != torch.float32:
            line = self.told({}, target.dtype, None)  # a stage that reads tensor by tensor
            if line is not None:
                print(f"nanohybrid: {line}", file=sys.stderr)
        at = 0
        for rows in gguf_source.decoded(self._open(entry.path), entry, 0, entry.shape[0]):
            target[at : at + rows.numel()].copy_(rows.flatten())
            at += rows.numel()

    def _open(self, path: Path) -> BinaryIO:
        if self._file is None or self._file[0] != path:
            self.close()
            self._file = (path, open_regular(path))  # open until the next shard
        return self._file[1]


class _MatrixFiles:
    """Where the layouts of quantized matrices read their tensors (quantized/matrix.py)."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._owner = ""
        self._loaded: dict[str, Tensor] = {}

    def rows(self, entry: Entry, begin: int, end: int) -> Tensor:
        return self._reader.read_rows(entry, begin, end)

    def whole(self, entry: Entry) -> Tensor:
        owner = entry.name.rpartition(".")[0]
        if owner != self._owner:
            self._owner, self._loaded = owner, {}
        if entry.name not in self._loaded:
            flat = Entry(entry.path, entry.name, entry.dtype, (prod(entry.shape),), entry.begin, entry.end)
            self._loaded[entry.name] = self.rows(flat, 0, flat.shape[0]).view(entry.shape)
        return self._loaded[entry.name]


def _bytes(entry: Entry) -> int:
    return entry.layout.bytes if isinstance(entry, MatrixEntry) else entry.end - entry.begin


@dataclass(frozen=True)
class StoredRows:
    """A stored matrix that is sliced by rows; `quantize` reads it (ops/quantized/torch.py)."""

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
        return self.reader.read_rows(self.entry, *rows.indices(self.shape[0])[:2]).to(self.device)


def _fill(file: BinaryIO, target: Tensor, entry: Entry) -> None:
    memory = target.view(torch.uint8).numpy().data
    while memory:
        got = file.readinto(memory)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(
                f"{entry.path}: {entry.name}: the file ends within it; is it being written to?"
            )
        memory = memory[got:]


@contextmanager
def _disk_errors(entry: Entry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{entry.path}: {entry.name}: cannot be read ({error.strerror})") from None


def has_weights(directory: Path) -> bool:
    """Whether a checkpoint has weights, valid or not; an index alone is none."""
    return is_gguf(directory) or any(directory.glob("*.safetensors"))


def _open_headers(directory: Path, tied: bool) -> dict[str, Entry]:
    """The tensors of all weight files by their names in the files."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return read_header(single)
    if index.exists():
        return _open_index(index, tied)
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if not shards:
        raise CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}; are the weights missing?")
    if len(shards) == 1 and re.fullmatch(r"model-0*1-of-0*1\.safetensors", shards[0].name):
        return read_header(shards[0])
    raise CheckpointError(
        f"{index}: no such file, and {shards[0].name} is one of several shards; copy the index too"
    )


def _open_index(index: Path, tied: bool) -> dict[str, Entry]:
    """The tensors that an index lists, each from its file. tied: a copy of the head may be there unlisted."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index}: has no weight_map, the table of the tensors and their files")
    where = {name: file for name, file in where.items() if not is_ignored(name)}
    for name, file in where.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            raise CheckpointError(
                f"{index}: {shown(name)}: its file {str(file)[:80]!r} is not a *.safetensors beside the index"
            )
        if not (index.parent / file).exists():
            raise CheckpointError(
                f"{index.parent / file}: no such file, but the index lists it; is the download complete?"
            )
    entries: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        for name, entry in read_header(index.parent / file).items():
            if where.get(name) == file or (tied and name == HEAD and name not in where):
                entries[name] = entry
            elif not is_ignored(name):
                raise CheckpointError(
                    f"{index.parent / file}: {shown(name)}: the index {_elsewhere(where.get(name))}; do the "
                    "files belong together?"
                )
    for name, file in where.items():
        if name not in entries:
            raise CheckpointError(
                f"{index.parent / file}: {shown(name)}: is not in the file, but the index lists it"
            )
    return entries


def _elsewhere(file: object) -> str:
    return "does not list it" if file is None else f"says it is in {file}"
