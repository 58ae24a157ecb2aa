"""`nanohybrid bench generate`, `bench serve` and `bench headline`: what is measured, and not planned.

Each measurement is a module of its own with `SUMMARY`, `parser()` and `run(arguments)`, as a command is; BENCHES names them.
"""

import importlib
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "how fast it is, measured (generate, serve, headline)"
BENCHES = {
    "generate": "nanohybrid.cli.bench_generate",
    "serve": "nanohybrid.cli.bench_serve",
    "headline": "nanohybrid.cli.bench_headline",
}


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench", SUMMARY)
    chosen = result.add_subcommands(dest="bench", required=True)
    for name, module in BENCHES.items():
        of = importlib.import_module(module)
        chosen.add_subcommand(name, of.parser(), help=of.SUMMARY)
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    chosen = arguments[arguments.bench]
    chosen.json = chosen.json or arguments.json
    return importlib.import_module(BENCHES[arguments.bench]).run(chosen) or 0
