"""Reading a JSON object from a file that a stranger wrote: whatever is wrong is one line naming the file."""

import json
from pathlib import Path
from typing import Any

from nanohybrid.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file (bare `Infinity` allowed). Raises CheckpointError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The object in JSON text; a key that stands twice is refused, since readers disagree on which one counts."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name}: is not JSON ({' '.join(str(error).split())[:100]}); was it cut off?"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: holds a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return result
