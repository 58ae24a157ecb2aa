"""`nanohybrid plan compress` and `plan serve`: what fits a memory, and how fast it can be, before a weight is read."""

from typing import TYPE_CHECKING

from nanohybrid.cli.group import group_parser, run_chosen

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "what fits a memory, and how fast it can be, before a weight is read (compress, serve)"
PLANS = {"compress": "nanohybrid.cli.plan_compress", "serve": "nanohybrid.cli.plan_serve"}


def parser() -> "jsonargparse.ArgumentParser":
    return group_parser("plan", SUMMARY, PLANS)


def run(arguments: "jsonargparse.Namespace") -> int:
    return run_chosen("plan", arguments, PLANS)
