"""`nanohybrid export gguf`: a checkpoint for other programs.

Each format is a module of its own with `SUMMARY`, `parser()` and `run(arguments)`, as a command is; FORMATS names them.
"""

import importlib
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "a checkpoint for other programs (gguf: llama.cpp)"
FORMATS = {"gguf": "nanohybrid.cli.export_gguf"}


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("export", SUMMARY)
    chosen = result.add_subcommands(dest="format", required=True)
    for name, module in FORMATS.items():
        of = importlib.import_module(module)
        chosen.add_subcommand(name, of.parser(), help=of.SUMMARY)
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    chosen = arguments[arguments.format]
    chosen.json = chosen.json or arguments.json
    return importlib.import_module(FORMATS[arguments.format]).run(chosen) or 0
