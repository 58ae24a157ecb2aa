"""Reading of a GGUF header from its first byte on, with a limit for every count and length.

The header is untrusted: no count or length is used before it is compared with the bytes that are left.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanohybrid.errors import CheckpointError

LARGEST_HEADER = 1 << 28  # bytes
LONGEST_STRING = 1 << 24
LONGEST_ARRAY = 1 << 24
STEP = 1 << 20  # bytes read from the file at once

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip


class Strings:
    """An array of strings, kept as it is in the file and decoded on each iteration."""

    def __init__(self, raw: bytes, count: int, name: str) -> None:
        self._raw, self._count, self._name = raw, count, name

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        at, raw, length_at = 0, self._raw, struct.Struct("<Q").unpack_from
        try:
            for _ in range(self._count):
                end = at + 8 + length_at(raw, at)[0]
                yield raw[at + 8 : end].decode("utf-8")
                at = end
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._name}: has a string that is not UTF-8") from None


Value = int | float | bool | str | np.ndarray | Strings


class Cursor:
    """The next byte of a header, and the values that begin there.

    Raises CheckpointError, naming the file, where a value is longer than the file or its limit.
    """

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self.size, self.path = file, size, path
        self._data = b""
        self.at = 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; is the file damaged?")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._ensure(count)
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, form: str) -> int:
        """The next integer, of a struct format."""
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self, what: str, longest: int = LONGEST_STRING) -> str:
        """The next string. Raises CheckpointError where it is longer than `longest` bytes or not UTF-8."""
        length = self.number("<Q")
        if length > longest:
            raise self.wrong(f"{what} has {length:,} bytes, where at most {longest:,} are allowed")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def value(self, kind: int, name: str) -> Value:
        """The next value of a type of GGUF."""
        if kind == STRING:
            return self.string(name)
        if kind == ARRAY:
            return self._array(name)
        if kind not in SCALARS:
            raise self.wrong(f"{name} has the unknown type {kind}")
        found = struct.unpack(SCALARS[kind], self.take(struct.calcsize(SCALARS[kind])))[0]
        return bool(found) if kind == BOOL else found

    def _array(self, name: str) -> Value:
        kind, count = self.number("<I"), self.number("<Q")
        if kind not in SCALARS and kind != STRING:
            raise self.wrong(f"{name} is an array of type {kind}, and known are numbers and strings")
        width = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        if count > LONGEST_ARRAY or count * width > self.size - self.at:
            raise self.wrong(f"{name} has {count:,} entries, more than the file can hold")
        if kind == STRING:
            return self._strings(name, count)
        dtype = np.dtype(bool) if kind == BOOL else np.dtype(SCALARS[kind])
        if kind == BOOL:
            return np.frombuffer(self.take(count), dtype=np.uint8) != 0
        return np.frombuffer(self.take(count * width), dtype=dtype)

    def _strings(self, name: str, count: int) -> Strings:
        begin, length_at = self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.at + 8 > len(self._data):
                self._ensure(8)
            length = length_at(self._data, self.at)[0]
            if length > LONGEST_STRING:
                raise self.wrong(f"{name} has a string of {length:,} bytes")
            if self.at + 8 + length > len(self._data):
                self._ensure(8 + length)
            self.at += 8 + length
        return Strings(self._data[begin : self.at], count, f"{self.path}: {name}")

    def _ensure(self, count: int) -> None:
        """Read on until `count` more bytes are in memory."""
        end = self.at + count
        if end <= len(self._data):
            return
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: ends within its header ({self.size:,} bytes); is the file truncated?"
            )
        if end > LARGEST_HEADER:
            raise self.wrong(f"its header has more than {LARGEST_HEADER:,} bytes")
        wanted = min(max(end, len(self._data) + STEP, 2 * len(self._data)), self.size, LARGEST_HEADER)
        self._data += self._file.read(wanted - len(self._data))
        if end > len(self._data):
            raise CheckpointError(f"{self.path}: ends within its header; is it being written to?")
