"""Commands of several modules: `plan compress | serve`, `bench generate | serve | compare`, `export gguf`.

Each module has `SUMMARY`, `parser()` and `run(arguments)`, like the module of a command. A group is a table
of names and modules.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser

if TYPE_CHECKING:
    import jsonargparse


def group_parser(
    command: str, summary: str, modules: Mapping[str, str], renamed: Mapping[str, str] = {}
) -> "jsonargparse.ArgumentParser":
    """The parser of `nanohybrid COMMAND NAME ...`.

    modules: NAME -> module. renamed: names of the last release -> names of today.
    """
    result = command_parser(command, summary)
    chosen = result.add_subcommands(dest=command, required=True)
    for name, module in modules.items():
        of = importlib.import_module(module)
        chosen.add_subcommand(name, of.parser(), help=of.SUMMARY)
    result.renamed_subcommands(renamed)
    return result


def run_chosen(command: str, arguments: "jsonargparse.Namespace", modules: Mapping[str, str]) -> int:
    """Run the chosen module; `--json` may come before or after its name."""
    name = arguments[command]
    chosen = arguments[name]
    chosen.json = chosen.json or arguments.json
    return importlib.import_module(modules[name]).run(chosen) or 0
