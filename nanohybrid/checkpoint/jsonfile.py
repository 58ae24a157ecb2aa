"""Reading of JSON objects from untrusted files, with errors of one line that name the file."""

import json
from pathlib import Path
from typing import Any

from nanohybrid.errors import CheckpointError
from nanohybrid.files import read_regular

LARGEST = 64_000_000
"""Bytes of a JSON file at most. The index of a model with 100,000 tensors has 10 MB."""


def read_object(path: Path, most: int = LARGEST) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes; `Infinity` is allowed.

    Raises CheckpointError where it cannot be read or is no regular file.
    """
    try:
        data = read_regular(path, most)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The object in a JSON text.

    Raises CheckpointError, with `name`, for other values and for duplicate keys, which are ambiguous.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name}: is not JSON ({' '.join(str(error).split())[:100]}); is it truncated?"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: is a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:80]!r}")
            seen.add(key)
    return result
