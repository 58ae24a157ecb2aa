"""Values as JSON: what a stage measures and what a command prints."""

import dataclasses
import json
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; dataclasses, paths, sets and the numbers and arrays of numpy and torch are understood."""
    return json.dumps(value, default=jsonable, ensure_ascii=False, indent=indent)


def jsonable(value: Any) -> Any:
    """What json cannot write by itself, as something that it can."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
