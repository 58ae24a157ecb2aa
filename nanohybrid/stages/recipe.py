"""Recipes: frozen dataclasses, written to TOML and read from it. Unknown keys and wrong types are refused.

TOML has no null. A field that may be None must therefore default to None; it is left out of the file when it
is None.

A key that was renamed keeps its old name for one release. The dataclass lists both names:

    RENAMED: ClassVar[dict[str, str]] = {"clip": "max_grad_norm"}

A new name with a dot stands in a table of the recipe: {"ffn": "fractions.intermediate_size"}. `load`, the
flags of a command and the comparison with stored lineage then accept the old name; a recipe file or a flag
that uses it gives a warning on stderr. Help texts and written recipes show the new name only.
"""

import dataclasses
import os
import re
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nanohybrid.errors import ConfigError, InputError

R = TypeVar("R")


def to_dict(recipe: Any) -> dict[str, Any]:
    """All fields of a recipe, defaults included, as values that TOML and JSON can hold.

    Raises ConfigError for others.
    """
    result = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value is not None:
            result[field.name] = plain(value, field.name)
        elif field.default is not None:
            raise ConfigError(
                f"{type(recipe).__name__}.{field.name} is None, which TOML cannot hold: give it a value"
            )
    return result


def plain(value: Any, name: str) -> Any:
    """`value` as lists, tables, strings, numbers and booleans.

    Raises ConfigError, with `name`, for anything else.
    """
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
        f"{name} is a {type(value).__name__}, which a recipe cannot hold: use numbers, strings, lists, "
        "tables or dataclasses"
    )


def dump(recipe: Any) -> str:
    """The recipe as TOML, with every field."""
    return to_toml(to_dict(recipe))


def to_toml(table: Mapping[str, Any]) -> str:
    """A table of plain values as TOML."""
    # imported late, as jsonargparse below: benchmarks/gpu trains with neither of them installed
    import tomli_w

    return tomli_w.dumps(table)


def load(kind: type[R], path: Path) -> R:
    """Read a recipe of dataclass `kind`.

    Raises InputError, naming the key, for an unknown key or a wrong type.
    """
    import jsonargparse

    table, _ = read_recipe(kind, path)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return from_namespace(kind, parser.instantiate(parser.parse_object(table)))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def from_namespace(kind: type[R], values: Any) -> R:
    """The recipe whose fields are attributes of `values`, which a parser returned."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(values, name) for name in names})


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError, naming the file, where it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not a readable TOML recipe: {reason}") from None


# Renamed keys


def read_recipe(kind: type, path: Path) -> tuple[dict[str, Any], bool]:
    """The tables of a recipe file, and whether they differ from the file.

    Keys have their current names; each old one gives a warning. Entries of lists have the defaults of their
    dataclasses. Raises InputError, naming the file, where it cannot be read or has both names of a key.
    """
    found = read_toml(path)
    try:
        table, used = with_current_names(kind, found)
        table = with_entry_defaults(kind, table)
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None
    warn_of_old_names(used, f"{path}: ")
    return table, table != found


def renamed_keys(kind: type) -> dict[str, str]:
    """Old name -> new name of every renamed key of a recipe, dotted (`optimizer.clip`); keys inside lists are
    left out.

    Where a table was renamed, each of its keys is listed under its old place too (`race.tokens`).
    """
    own: dict[str, str] = dict(getattr(kind, "RENAMED", {}))
    result = dict(own)
    for name, part, in_list in _nested(kind):
        if in_list:
            continue
        inner = renamed_keys(part)
        for place in [name, *(old for old, new in own.items() if new == name)]:
            result |= {f"{place}.{old}": f"{name}.{new}" for old, new in inner.items()}
            if place != name:
                result |= {f"{place}.{key}": f"{name}.{key}" for key in _keys(part)}
    return result


def with_current_names(kind: type, table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """`table` with renamed keys under their new names, and what was renamed: old name -> new name, dotted.

    Values that are not tables where the recipe wants tables stay as they are; the parser refuses them. Raises
    ConfigError where a table has both names of a key.
    """
    renamed: Mapping[str, str] = getattr(kind, "RENAMED", {})
    result: dict[str, Any] = {}
    used = {}
    for key, value in table.items():
        if key in renamed:
            used[key] = renamed[key]
        else:
            result[key] = value
    for key, name in used.items():
        *path, leaf = name.split(".")
        place = result
        for step in path:
            inner = place.get(step, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{step} must be a table")
            place[step] = dict(inner)
            place = place[step]
        if leaf in place:
            raise ConfigError(
                f"has both {key} and {name}, which are the old and the new name of one key: remove {key}"
            )
        place[leaf] = table[key]
    for name, part, _ in _nested(kind):
        value = result.get(name)
        if isinstance(value, Mapping):
            result[name], inner = with_current_names(part, value)
            used |= {f"{name}.{old}": f"{name}.{new}" for old, new in inner.items()}
        elif isinstance(value, list):
            entries = [
                with_current_names(part, entry) if isinstance(entry, Mapping) else (entry, {})
                for entry in value
            ]
            result[name] = [entry for entry, _ in entries]
            used |= {f"{name}.{old}": f"{name}.{new}" for _, inner in entries for old, new in inner.items()}
    return result, used


# Defaults of entries


def with_entry_defaults(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """`table`, where entries of lists and optional tables hold every default of their nested tables.

    The parser gives a nested table of an entry the defaults of the nested class. A dataclass may have others:
    `GrpoRecipe.optimizer` has a learning rate of its own. Raises ConfigError where a nested value of an entry
    is not a table.
    """
    return _completed(kind, table, {})


def _completed(kind: type, table: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`table` over `defaults`; below it, each list's entry and each optional table over its own defaults."""
    result = {**defaults, **table}
    factories = {field.name: field.default_factory for field in dataclasses.fields(kind)}
    for name, part, in_list in _nested(kind):
        value = result.get(name)
        if in_list and isinstance(value, list):
            result[name] = [
                _completed(part, entry, _tables(part)) if isinstance(entry, Mapping) else entry
                for entry in value
            ]
        elif isinstance(value, Mapping):
            optional = factories[name] is dataclasses.MISSING
            given = _tables(part) if optional else defaults.get(name, {})
            result[name] = _completed(part, value, given)
        elif name in defaults:
            raise ConfigError(f"{name} must be a table, not {value!r}")
    return result


def _tables(kind: type) -> dict[str, Any]:
    """The nested tables of a dataclass with their defaults."""
    return {
        field.name: to_dict(field.default_factory())
        for field in dataclasses.fields(kind)
        if field.default_factory is not dataclasses.MISSING
        and any(field.name == name and not in_list for name, _, in_list in _nested(kind))
    }


def warn_of_old_names(used: Mapping[str, str], where: str = "") -> None:
    """One warning line on stderr for each old name (of a key or a flag) that was used."""
    for old, new in used.items():
        print(
            f"nanohybrid: warning: {where}{old} is now {new}; the old name works until the next release",
            file=sys.stderr,
        )


def _keys(kind: type) -> Iterator[str]:
    """The keys of a recipe, those of nested dataclasses dotted."""
    nested = {name: part for name, part, in_list in _nested(kind) if not in_list}
    for field in dataclasses.fields(kind):
        yield field.name
        if field.name in nested:
            yield from (f"{field.name}.{key}" for key in _keys(nested[field.name]))


def _nested(kind: type) -> Iterator[tuple[str, type, bool]]:
    """Fields that are dataclasses, or lists of one: (name, dataclass, whether it is a list)."""
    for name, hint in typing.get_type_hints(kind).items():
        options = (hint, *typing.get_args(hint))
        in_list = typing.get_origin(hint) in (tuple, list)
        for option in options:
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                yield name, option, in_list


# Messages


def one_line(error: Exception) -> str:
    """A parser's error message as one short line that begins with the name of the key."""
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
    """The types that a union accepts, None left out."""
    return f"expected {' or '.join(kind for kind in found[1].split(', ') if kind != 'NoneType')}, got "
