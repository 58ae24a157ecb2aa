"""The header of a safetensors file: names, types, shapes and positions of its tensors.

    8 bytes: N, little-endian | N bytes: JSON {name: {dtype, shape, data_offsets}} | bytes of the tensors

Tensors are not read here. The header is untrusted: sizes, types, shapes and offsets are checked against each
other and the file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from nanohybrid.checkpoint.jsonfile import parse_object
from nanohybrid.errors import CheckpointError
from nanohybrid.files import open_regular

LARGEST_HEADER = 100_000_000  # bytes; the limit of the format
WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
TYPES = FLOATS | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors' name of its type, its shape, and its bytes [begin, end)."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises CheckpointError, naming file and tensor, for a damaged header.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if len(first) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: has {size:,} bytes, too few for its header of {length or 8:,}; is the file "
                    "truncated?"
                )
            if length > LARGEST_HEADER:
                raise CheckpointError(
                    f"{path}: its header of {length:,} bytes exceeds the limit of safetensors; is it a "
                    "safetensors file?"
                )
            header = parse_object(file.read(length), f"{path}: its header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_cover(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {shown(name)}: {what}; is the file damaged?")

    if shown(name) != name:
        raise wrong("is not a valid name of a tensor")

    if not isinstance(value, dict):
        raise wrong("its header entry is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise wrong(f"its type {str(dtype)[:40]!r} is unknown")
    if not _naturals(shape) or len(shape) > 16:
        raise wrong("its shape is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("its data_offsets are not a begin and an end")
    need = prod(shape) * WIDTHS[dtype]
    if offsets[1] - offsets[0] != need:
        raise wrong(
            f"{dtype} {list(shape)} needs {need:,} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]:,}"
        )
    return Entry(path, name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def shown(name: str) -> str:
    """A name from a file for a message: on one line, and of limited length."""
    return name if name.isprintable() and len(name) <= 200 else repr(name[:60]) + "..."


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _check_cover(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Raise CheckpointError unless the tensors fill the rest of the file without gaps and overlaps."""
    at = base
    for entry in entries.values():
        if entry.end > size:
            raise CheckpointError(
                f"{path}: {entry.name}: ends at byte {entry.end:,}, but the file has {size:,}; is the file "
                "truncated?"
            )
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            raise CheckpointError(
                f"{path}: {entry.name}: starts at byte {entry.begin:,}, but byte {at:,} is expected; is the "
                "file damaged?"
            )
        at = entry.end
    if at != size:
        raise CheckpointError(
            f"{path}: its tensors end at byte {at:,}, but the file has {size:,}; is it damaged or still "
            "being written?"
        )


def encode_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a file with these tensors in this order, and the first byte of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        begins[name], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # alignment, for readers that map the file
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}
