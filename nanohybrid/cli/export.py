"""`nanohybrid export gguf`: export to other programs."""

from typing import TYPE_CHECKING

from nanohybrid.cli.subcommands import group_parser, run_chosen

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "export a checkpoint to other programs (gguf: llama.cpp)"
FORMATS = {"gguf": "nanohybrid.cli.export_gguf"}


def parser() -> "jsonargparse.ArgumentParser":
    return group_parser("export", SUMMARY, FORMATS)


def run(arguments: "jsonargparse.Namespace") -> int:
    return run_chosen("export", arguments, FORMATS)
