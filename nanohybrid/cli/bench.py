"""`nanohybrid bench generate`, `bench serve` and `bench headline`: what is measured, and not planned."""

from typing import TYPE_CHECKING

from nanohybrid.cli.subcommands import group_parser, run_chosen

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "how fast it is, measured (generate, serve, headline)"
BENCHES = {
    "generate": "nanohybrid.cli.bench_generate",
    "serve": "nanohybrid.cli.bench_serve",
    "headline": "nanohybrid.cli.bench_headline",
}


def parser() -> "jsonargparse.ArgumentParser":
    return group_parser("bench", SUMMARY, BENCHES)


def run(arguments: "jsonargparse.Namespace") -> int:
    return run_chosen("bench", arguments, BENCHES)
