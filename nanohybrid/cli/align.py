"""`nanohybrid align sft | grpo | merge`: a base model -> one that thinks and answers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, recipe_from, recipe_parser
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.cli.outcome import report

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "a base model -> one that thinks and answers (sft, grpo, merge)"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("align", SUMMARY)
    chosen = result.add_subcommands(dest="stage", required=True)
    for name, (make, summary) in STAGES.items():
        chosen.add_subcommand(name, make(summary), help=summary)
    return result


def sft_parser(summary: str) -> "jsonargparse.ArgumentParser":
    from nanohybrid.align import SftRecipe

    result = recipe_parser("align sft", summary, SftRecipe)
    add_directory(result, "model", "the base model")
    result.add_argument("--data", type=Path, metavar="DIR", help="a data directory, for the share of text")
    add_device_flag(result)
    return result


def grpo_parser(summary: str) -> "jsonargparse.ArgumentParser":
    from nanohybrid.align import GrpoRecipe

    result = recipe_parser("align grpo", summary, GrpoRecipe)
    add_directory(result, "model", "the aligned model to improve")
    add_device_flag(result)
    return result


def merge_parser(summary: str) -> "jsonargparse.ArgumentParser":
    from nanohybrid.align import MergeRecipe

    result = recipe_parser("align merge", summary, MergeRecipe)
    add_directory(result, "first", "a checkpoint; its tokenizer is kept")
    add_directory(result, "second", "its twin")
    return result


def add_directory(parser: "jsonargparse.ArgumentParser", name: str, what: str) -> None:
    """A required flag for an input directory."""
    parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=what)


STAGES: dict[str, tuple[Callable[[str], "jsonargparse.ArgumentParser"], str]] = {
    "sft": (sft_parser, "learn to think and to answer from chats"),
    "grpo": (grpo_parser, "learn from verifiable rewards on its own completions"),
    "merge": (merge_parser, "a point between two checkpoints"),
}


def run(arguments: "jsonargparse.Namespace") -> None:
    from nanohybrid import align

    chosen = arguments[arguments.stage]
    if arguments.stage == "sft":
        device = usable_device(chosen.device)
        out = align.sft(recipe_from(align.SftRecipe, chosen), chosen.model, chosen.out, chosen.data, device)
    elif arguments.stage == "grpo":
        device = usable_device(chosen.device)
        out = align.grpo(recipe_from(align.GrpoRecipe, chosen), chosen.model, chosen.out, device)
    else:
        out = align.merge(recipe_from(align.MergeRecipe, chosen), chosen.first, chosen.second, chosen.out)
    report(out, chosen.json or arguments.json)
