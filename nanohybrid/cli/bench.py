"""`nanohybrid bench generate`, `bench serve` and `bench compare`: measured speed."""

from typing import TYPE_CHECKING

from nanohybrid.cli.subcommands import group_parser, run_chosen

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "measured speed of a model, a server, two models compared (generate, serve, compare)"
BENCHES = {
    "generate": "nanohybrid.cli.bench_generate",
    "serve": "nanohybrid.cli.bench_serve",
    "compare": "nanohybrid.cli.bench_compare",
}
RENAMED = {"headline": "compare"}


def parser() -> "jsonargparse.ArgumentParser":
    return group_parser("bench", SUMMARY, BENCHES, RENAMED)


def run(arguments: "jsonargparse.Namespace") -> int:
    return run_chosen("bench", arguments, BENCHES)
