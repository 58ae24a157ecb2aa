"""`nanohybrid plan compress` and `plan serve`: what fits a memory, and how fast it can be, before a weight is read.

Each plan is a module of its own with `SUMMARY`, `parser()` and `run(arguments)`, as a command is; PLANS names them.
"""

import importlib
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "what fits a memory, and how fast it can be, before a weight is read (compress, serve)"
PLANS = {"compress": "nanohybrid.cli.plan_compress", "serve": "nanohybrid.cli.plan_serve"}


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("plan", SUMMARY)
    chosen = result.add_subcommands(dest="plan", required=True)
    for name, module in PLANS.items():
        of = importlib.import_module(module)
        chosen.add_subcommand(name, of.parser(), help=of.SUMMARY)
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    chosen = arguments[arguments.plan]
    chosen.json = chosen.json or arguments.json
    return importlib.import_module(PLANS[arguments.plan]).run(chosen) or 0
