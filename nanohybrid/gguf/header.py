"""The header of a GGUF file: metadata, and names, types, shapes and positions of the tensors.

    magic, version, counts | key, type, value ... | name, shape, type, offset ... | tensors, each aligned

Versions 2 and 3, little-endian; one file, or the first of several parts (`-00001-of-00003.gguf`). Tensors are
not read here. What the header says is checked against itself and the file, as llama.cpp does: tensors follow
one another without gaps or overlaps. Format: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nanohybrid.errors import CheckpointError, shown
from nanohybrid.gguf.cursor import Cursor, Strings, Value
from nanohybrid.gguf.kinds import KINDS, NUMBERS, OTHERS

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_TENSORS, MOST_KEYS, MOST_PARTS = 100_000, 65_536, 1_000
LONGEST_KEY, LONGEST_NAME = 65_535, 256
MOST_DIMENSIONS = 4
MOST_ELEMENTS = 1 << 40
ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 20
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: the type's name, its shape with the rows first, and its bytes [begin, end) of `path`."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """The metadata and the tensors of a file, or of all its parts."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture. Raises CheckpointError where the file has none."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A value that must be a string. Raises CheckpointError where it is missing or another."""
        return self._of(key, str, "a string")

    def whole(self, key: str, default: int | None = None) -> int:
        """A value that must be a whole number, of at least 0."""
        if default is not None and key not in self.metadata:
            return default
        found = self._of(key, int, "a whole number")
        if isinstance(found, bool) or found < 0:
            raise self.wrong(f"{key} is {shown(found)}: it must be a whole number")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A value that must be a number."""
        if default is not None and key not in self.metadata:
            return default
        return float(self._of(key, (int, float), "a number"))

    def flag(self, key: str) -> bool | None:
        """A value that must be true or false; None where it is missing."""
        return self._of(key, bool, "true or false") if key in self.metadata else None

    def strings(self, key: str) -> Strings:
        """A value that must be an array of strings."""
        return self._of(key, Strings, "an array of strings")

    def wholes(self, key: str) -> np.ndarray:
        """A value that must be an array of whole numbers."""
        found = self._of(key, np.ndarray, "an array of whole numbers")
        if found.dtype.kind not in "iu":
            raise self.wrong(f"{key} is an array of {found.dtype}: it must be one of whole numbers")
        return found

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _of(self, key: str, kind: Any, what: str) -> Any:
        if key not in self.metadata:
            raise self.wrong(f"{key} is missing")
        found = self.metadata[key]
        if not isinstance(found, kind):
            raise self.wrong(f"{key} is {shown(found)}: it must be {what}")
        return found


def is_gguf(path: str | Path) -> bool:
    """Whether a path is to be read as a GGUF file: a file that begins with GGUF, or a name that ends so."""
    path = Path(path)
    try:
        if not path.is_file():
            return path.suffix.lower() == ".gguf" and not path.is_dir()
        if path.suffix.lower() == ".gguf":
            return True
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file, and of all its parts where `path` is the first of several.

    Raises CheckpointError, in one line that names the file, for a damaged or unsupported one.
    """
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return _opened(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _opened(path: Path, *_identity: int) -> GgufFile:
    metadata, tensors = _read_part(path)
    whole = GgufFile(path, metadata, tensors)
    count = whole.whole("split.count", 1)
    if count > 1:
        _add_parts(whole, tensors, count)
    if not tensors:
        raise whole.wrong("has no tensors; it holds a vocabulary, and not a model")
    return whole


def _add_parts(whole: GgufFile, tensors: dict[str, GgufTensor], count: int) -> None:
    """Add the tensors of the other parts to those of the first."""
    named = PART.fullmatch(whole.path.name)
    if named is None or count > MOST_PARTS:
        raise whole.wrong(f"is one of {count:,} parts, but is not named as in model-00001-of-00003.gguf")
    first = f"{named['stem']}-00001-of-{count:05d}.gguf"
    if whole.whole("split.no") != 0 or whole.path.name != first:
        raise whole.wrong(f"is one of {count} parts; name the first of them, {first}")
    for number in range(2, count + 1):
        part = whole.path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{part}: no such file; is the download of the {count} parts complete?")
        metadata, found = _read_part(part)
        if metadata.get("split.no") != number - 1 or metadata.get("split.count") != count:
            raise CheckpointError(f"{part}: is not part {number} of {count}; do the files belong together?")
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{part}: {shown(name)}: is in {tensors[name].path.name} too")
            tensors[name] = tensor
    wanted = whole.whole("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise whole.wrong(f"its parts have {len(tensors):,} tensors, and it says {wanted:,}")


def _read_part(path: Path) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _read(Cursor(file, size, path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _read(cursor: Cursor) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{cursor.path}: does not begin with GGUF; is it a GGUF file?")
    version = cursor.number("<I")
    if version not in VERSIONS:
        big = version.to_bytes(4, "little") in [known.to_bytes(4, "big") for known in VERSIONS]
        found = "is big-endian" if big else f"has version {version}"
        raise CheckpointError(f"{cursor.path}: {found}; supported is GGUF 2 and 3, little-endian")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    if key_count > MOST_KEYS or 13 * key_count > cursor.size:
        raise cursor.wrong(f"has {key_count:,} keys, more than the file can hold")
    if tensor_count > MOST_TENSORS or 24 * tensor_count > cursor.size:
        raise cursor.wrong(f"has {tensor_count:,} tensors, more than the file can hold")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.string("a key", LONGEST_KEY)
        if not key:
            raise cursor.wrong("a key is empty")
        if key in metadata:
            raise cursor.wrong(f"the key {shown(key)} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"), shown(key))
    return metadata, _tensors(cursor, tensor_count, _alignment(cursor, metadata))


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if isinstance(found, int) and 8 <= found <= LARGEST_ALIGNMENT and not found & (found - 1):
        return found
    raise cursor.wrong(f"general.alignment is {shown(found)}, and must be a power of two of at least 8")


def _tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.string("the name of a tensor", LONGEST_NAME)
        if name in infos:
            raise cursor.wrong(f"the tensor {shown(name)} is there twice")
        infos[name] = _info(cursor, shown(name))
    begin = -(-cursor.at // alignment) * alignment
    tensors, at = {}, 0
    for name, (kind, shape, offset) in infos.items():
        if offset != at:
            raise cursor.wrong(f"{shown(name)} starts at byte {offset:,} of the tensors, expected is {at:,}")
        end = offset + prod(shape) // KINDS[kind].weights * KINDS[kind].bytes
        if begin + end > cursor.size:
            raise CheckpointError(
                f"{cursor.path}: {shown(name)}: ends at byte {begin + end:,}, but the file has "
                f"{cursor.size:,}; is the download complete?"
            )
        tensors[name] = GgufTensor(cursor.path, name, kind, shape, begin + offset, begin + end)
        at = -(-end // alignment) * alignment
    return tensors


def _info(cursor: Cursor, name: str) -> tuple[str, tuple[int, ...], int]:
    """Type, shape (rows first) and offset of the next tensor."""
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise cursor.wrong(f"{name} has {dimensions:,} dimensions, and known are 1 to {MOST_DIMENSIONS}")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    if number not in NUMBERS:
        called = OTHERS.get(number, f"of type {number}")
        raise CheckpointError(
            f"{cursor.path}: {name}: is {called}, which is not supported; known are {', '.join(KINDS)}"
        )
    kind = NUMBERS[number]
    if min(shape) < 1 or prod(shape) > MOST_ELEMENTS:
        raise cursor.wrong(f"{name} has the shape {list(shape)}")
    if shape[-1] % KINDS[kind].weights:
        raise cursor.wrong(f"{name}: rows of {shape[-1]:,} are no whole blocks of {kind}")
    return kind, shape, offset
