"""JSON of the results of stages and commands."""

import dataclasses
import json
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON.

    Dataclasses, paths, sets, and numpy and torch arrays are converted; raises TypeError for other types.
    """
    return json.dumps(value, default=jsonable, ensure_ascii=False, indent=indent)


def jsonable(value: Any) -> Any:
    """A value of a type that the json module does not know, as one that it knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
