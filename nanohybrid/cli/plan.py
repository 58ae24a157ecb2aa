"""`nanohybrid plan compress`, `plan serve` and `plan train`: what fits a memory, and how fast it can be,
before a weight is read.
"""

from typing import TYPE_CHECKING

from nanohybrid.cli.subcommands import group_parser, run_chosen

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "what fits a memory, and how fast it can be, before a weight is read (compress, serve, train)"
PLANS = {
    "compress": "nanohybrid.cli.plan_compress",
    "serve": "nanohybrid.cli.plan_serve",
    "train": "nanohybrid.cli.plan_train",
}


def parser() -> "jsonargparse.ArgumentParser":
    return group_parser("plan", SUMMARY, PLANS)


def run(arguments: "jsonargparse.Namespace") -> int:
    return run_chosen("plan", arguments, PLANS)
