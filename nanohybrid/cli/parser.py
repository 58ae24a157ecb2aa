"""The argument parser of every command: flags in kebab-case, old names of renamed flags, and help text
without type noise.

Accepted beside `--batch-tokens`: `--batch_tokens`, and for one release the old name of a renamed flag, with a
warning on stderr. Renamed keys of a recipe are listed in its dataclass (stages/recipe.py); other renamed
flags are given to `CommandParser.renamed`.
"""

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from nanohybrid.stages.recipe import (
    read_recipe,
    renamed_keys,
    to_toml,
    warn_of_old_names,
    with_entry_defaults,
)

RECIPE_FLAG = "--recipe"
USAGE_FLAGS = 12
"""Parsers with more flags than this show only positional and required arguments in their usage line."""


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help text with a placeholder that tells the type (N, X, PATH, NAME) and with defaults as a user would
    type them."""

    def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(prog.replace(" [options] ", " "), *args, **kwargs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        notes = ["required"] if action.required and action.option_strings else []
        default = "" if action.nargs == 0 else default_text(action.default)
        if action.option_strings and default and "default" not in text:
            notes.append(f"default: {default}")
        return f"{text} ({', '.join(notes)})".lstrip() if notes else text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return placeholder(action)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *args: Any, **kwargs: Any
    ) -> None:
        actions = list(actions)
        options = [action for action in actions if action.option_strings and action.help != argparse.SUPPRESS]
        if usage is None and len(options) > USAGE_FLAGS:
            needed = [action for action in options if action.required]
            words = [
                f"{action.option_strings[0]} {self._format_args(action, placeholder(action))}"
                for action in needed
            ]
            words += [
                self._format_args(action, str(action.metavar or action.dest))
                for action in actions
                if not action.option_strings
            ]
            usage = " ".join(["%(prog)s [options]", *(word.replace("%", "%%") for word in words)])
        super().add_usage(usage, actions, *args, **kwargs)


class CommandParser(jsonargparse.ArgumentParser):
    """A parser of `nanohybrid COMMAND`.

    Flags are shown in kebab-case; snake_case and renamed flags are accepted too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, "print_config": None, **kwargs})
        self._recipe: type | None = None
        self._old_flags: dict[str, str] = {}
        self._old_subcommands: dict[str, str] = {}

    def add_recipe(self, kind: type) -> None:
        """Add `--recipe FILE.toml` and a flag for each field of the dataclass `kind`, nested with dots."""
        self.add_argument(
            RECIPE_FLAG,
            action="config",
            metavar="FILE.toml",
            help="a recipe; flags after it override its values",
        )
        self.add_class_arguments(kind)
        for action in self._actions:
            self._show_in_kebab_case(action)
        self._recipe = kind
        self.renamed({f"--{old}": f"--{new}" for old, new in renamed_keys(kind).items()})

    def renamed(self, flags: dict[str, str]) -> None:
        """Accept old flags for one release: old -> new, both with dashes (`{"--max-running":
        "--max-num-seqs"}`)."""
        self._old_flags |= {kebab_case(old): kebab_case(new) for old, new in flags.items()}

    def renamed_subcommands(self, names: Mapping[str, str]) -> None:
        """Accept old names of subcommands for one release: old -> new."""
        self._old_subcommands |= names

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> jsonargparse.Namespace:
        """Parse arguments.

        Raises argparse.ArgumentError, or InputError where a recipe file cannot be read.
        """
        if args is None:
            return super().parse_args(args, *others, **kwargs)
        return super().parse_args(
            self._with_current_recipe(self._with_current_flags(list(args))), *others, **kwargs
        )

    def _show_in_kebab_case(self, action: argparse.Action) -> None:
        flags = [kebab_case(flag) for flag in action.option_strings]
        for old in set(action.option_strings) - set(flags):
            del self._option_string_actions[old]
        action.option_strings = flags
        self._option_string_actions |= dict.fromkeys(flags, action)
        if (
            type(action).__name__ == "_ActionConfigLoad"
        ):  # `--optimizer FILE`, beside one flag for each of its fields
            action.help = argparse.SUPPRESS

    def _with_current_flags(self, arguments: list[str]) -> list[str]:
        """The arguments of this parser with its flags as they are registered; those of a subcommand are left
        alone."""
        result, used = [], {}
        for index, argument in enumerate(arguments):
            if argument in self._old_subcommands:
                used[argument] = self._old_subcommands[argument]
                result += [used[argument], *arguments[index + 1 :]]
                break
            if argument == "--" or (
                self._subcommands_action and argument in self._subcommands_action.choices
            ):
                result += arguments[index:]
                break
            flag, equals, value = argument.partition("=")
            name = self._current_flag(flag)
            if kebab_case(flag) in self._old_flags:
                used[flag] = name
            result.append(name + equals + value)
        warn_of_old_names(used)
        return result

    def _current_flag(self, flag: str) -> str:
        """The registered name of a flag that was typed; what is not one comes back as it is."""
        known = self._option_string_actions
        kebab = kebab_case(flag)
        if not flag.startswith("--") or flag in known:
            return flag
        if kebab in self._old_flags:
            return self._old_flags[kebab]
        return kebab if any(name.startswith(kebab) for name in known) else flag

    def _with_current_recipe(self, arguments: list[str]) -> list[str]:
        """The arguments, with a recipe file replaced by its text where that must change: renamed keys, and
        defaults of the entries of lists. A list that is given as JSON gets these defaults too."""
        if self._recipe is None:
            return arguments
        result = list(arguments)
        for index, argument in enumerate(arguments):
            flag, equals, value = argument.partition("=")
            if not flag.startswith("--") or not (equals or index + 1 < len(arguments)):
                continue
            path = value if equals else arguments[index + 1]
            if flag != RECIPE_FLAG:
                result[index if equals else index + 1] = (flag + equals if equals else "") + (
                    self._with_entry_defaults(flag, path)
                )
                continue
            table, differs = read_recipe(self._recipe, Path(path))
            if differs:
                result[index if equals else index + 1] = (RECIPE_FLAG + equals if equals else "") + to_toml(
                    table
                )
        return result

    def _with_entry_defaults(self, flag: str, value: str) -> str:
        """The value of a flag: a JSON list of tables with the defaults of its entries, others as they are."""
        try:
            entries = json.loads(value) if value.startswith("[") else None
        except ValueError:  # the parser reports what it is not
            return value
        name = flag.removeprefix("--").replace("-", "_")
        table = {name: entries}
        filled = with_entry_defaults(self._recipe, table) if self._recipe and entries else table
        return value if filled == table else json.dumps(filled[name])


def kebab_case(flag: str) -> str:
    """`--batch_tokens` as `--batch-tokens`; a lone `_` in a positional argument is not touched."""
    return flag.replace("_", "-") if flag.startswith("--") else flag


def placeholder(action: argparse.Action) -> str:
    """What stands for the value of a flag in help text: N, X, PATH, NAME, or the choices."""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kind = getattr(action, "_typehint", None) or action.type
    options = [option for option in typing.get_args(kind) if option is not type(None)] or [kind]
    names: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "NAME"}
    return "|".join(names[option] for option in options if option in names) or "VALUE"


def default_text(default: Any) -> str:
    """A default as a user would type it; empty where there is none, or nothing that fits on a line."""
    if default is None or default == argparse.SUPPRESS or isinstance(default, jsonargparse.Namespace):
        return ""
    if isinstance(default, tuple | list):
        plain = not any(dataclasses.is_dataclass(entry) for entry in default)
        return json.dumps(list(default), default=str) if default and plain else ""
    return str(default).lower() if isinstance(default, bool) else str(default)
