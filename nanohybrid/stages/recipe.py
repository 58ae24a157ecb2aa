"""A recipe: a frozen dataclass, as TOML and back, strict in both directions.

TOML has no null, so a field that may be None must default to None: it is left out when it is None.
"""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nanohybrid.errors import ConfigError, InputError

R = TypeVar("R")


def to_dict(recipe: Any) -> dict[str, Any]:
    """Every field of a recipe, defaults resolved, as what TOML and JSON can hold."""
    result = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value is not None:
            result[field.name] = plain(value, field.name)
        elif field.default is not None:
            raise ConfigError(
                f"{type(recipe).__name__}.{field.name} is None, which TOML cannot say: give it a value"
            )
    return result


def plain(value: Any, name: str) -> Any:
    """`value` in lists, tables, strings, numbers and booleans."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{name} is a {type(value).__name__}, which a recipe cannot hold: use numbers, strings, lists, tables or dataclasses"
    )


def dump(recipe: Any) -> str:
    """The recipe as TOML that stands alone: every field, resolved."""
    return to_toml(to_dict(recipe))


def to_toml(table: Mapping[str, Any]) -> str:
    """A table of plain values as TOML."""
    import tomli_w  # here as below: training itself needs neither, and benchmarks/gpu runs it with torch and little else

    return tomli_w.dumps(table)


def load(kind: type[R], path: Path) -> R:
    """Read a recipe of dataclass `kind`; an unknown key or a wrong type is refused with the key's name."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return from_namespace(kind, parser.instantiate(parser.parse_object(read_toml(path))))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def from_namespace(kind: type[R], values: Any) -> R:
    """The recipe whose fields are attributes of what a parser returned."""
    return kind(**{field.name: getattr(values, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; one line that names the file where it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not a readable TOML recipe: {reason}") from None


def one_line(error: Exception) -> str:
    """A parser's complaint as one short line that begins with the key's name."""
    text = " ".join(str(error).split())
    text = re.sub(r"^Parser key \"([^\"]*)\":", r"\1:", text)
    text = re.sub(r"<class '([\w.]+)'>|typing\.(?=\w)", r"\1", text)
    text = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: ",
        _either,
        text,
    )
    text = re.sub(
        r"Not a valid subclass of (\w+)\. Got value: (.*?) Subclass types expect .*",
        r"expected a table of \1, got \2",
        text,
    )
    return re.sub(r"Expected an? (.*?)\. Got value: ", r"expected \1, got ", text)


def _either(found: re.Match[str]) -> str:
    """What a value of several types may be, where nothing at all is one of them."""
    return f"expected {' or '.join(kind for kind in found[1].split(', ') if kind != 'NoneType')}, got "
