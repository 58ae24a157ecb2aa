"""`nanohybrid align sft | grpo | merge`: post-training of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import MODEL, command_parser, recipe_from, recipe_parser
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.cli.outcome import report

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "post-training: SFT on chats, GRPO on verifiable rewards, merging (sft, grpo, merge)"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("align", SUMMARY)
    chosen = result.add_subcommands(dest="stage", required=True)
    for name, (make, summary) in STAGES.items():
        chosen.add_subcommand(name, make(summary), help=summary)
    return result


def sft_parser(summary: str) -> "jsonargparse.ArgumentParser":
    from nanohybrid.align import SftRecipe

    result = recipe_parser("align sft", summary, SftRecipe)
    add_model(result, "model", "the base model")
    result.add_argument("--data", type=Path, metavar="DIR", help="a data directory, for --shares.text")
    add_device_flag(result)
    return result


def grpo_parser(summary: str) -> "jsonargparse.ArgumentParser":
    from nanohybrid.align import GrpoRecipe

    result = recipe_parser("align grpo", summary, GrpoRecipe)
    add_model(result, "model", "the model to train")
    add_device_flag(result)
    return result


def merge_parser(summary: str) -> "jsonargparse.ArgumentParser":
    from nanohybrid.align import MergeRecipe

    result = recipe_parser("align merge", summary, MergeRecipe)
    add_model(result, "first", "a checkpoint; the result has its tokenizer")
    add_model(result, "second", "a checkpoint of the same architecture")
    return result


def add_model(parser: "jsonargparse.ArgumentParser", name: str, what: str) -> None:
    """A required flag for an input model."""
    parser.add_argument(f"--{name}", type=Path, required=True, metavar="PATH", help=f"{what}; {MODEL}")


STAGES: dict[str, tuple[Callable[[str], "jsonargparse.ArgumentParser"], str]] = {
    "sft": (sft_parser, "supervised fine-tuning on chats with and without thinking"),
    "grpo": (grpo_parser, "reinforcement learning from verifiable rewards"),
    "merge": (merge_parser, "linear interpolation of two checkpoints"),
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
