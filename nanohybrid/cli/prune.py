"""`nanohybrid prune`: a checkpoint to a smaller one, by sizes or by named layers."""

import sys
from pathlib import Path

import jsonargparse

from nanohybrid.cli.common import MODEL, command_parser, print_json, table
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.cli.parser import CommandParser
from nanohybrid.errors import InputError

SUMMARY = "a model -> a smaller one by given sizes or layers (the first half of compress)"
LAYERS = "--layers"
RENAMED = {"--samples": "--num-calibration-samples", "--length": "--max-calibration-length"}
"""Old flags, for one release."""
# written out since --help must not import torch; tests/prune/test_prune_command.py checks it
SIZES = {
    "--hidden-size": "embedding channels to keep",
    "--intermediate-size": "FFN neurons to keep in each MLP layer",
    "--mamba-heads": "heads to keep in each Mamba layer, as many in each group",
    "--mamba-head-dim": "channels to keep of each Mamba head",
    "--attention-heads": "query heads to keep in each attention layer, as many for each key/value head",
}


def parser() -> CommandParser:
    """The flags of pruning: an axis whose size is not given stays whole."""
    result = command_parser("prune", SUMMARY)
    result.add_argument("path", type=Path, metavar="PATH", help=MODEL)
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="the output directory")
    result.add_argument(
        LAYERS,
        type=int | None,
        metavar="N",
        help="layers to keep; which ones go is found by skipping them, iteratively",
    )
    for flag, what in size_flags().items():
        result.add_argument(flag, type=int | None, metavar="N", help=what)
    result.add_argument("--drop-layers", metavar="I,J", help="remove these layers, counted from 0")
    result.add_argument(
        "--importance",
        type=Path,
        metavar="FILE",
        help="scores that an earlier run wrote (importance.safetensors)",
    )
    result.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="documents to measure scores on: token stores, or JSON lines with text",
    )
    add_calibration_flags(result, samples=256)
    result.add_argument(
        "--depth-importance",
        choices=["iterative", "one-shot", "cosine"],
        default="iterative",
        help="how --layers are ranked: iterative (as in the paper), one-shot, or cosine",
    )
    result.add_argument(
        "--depth-unit",
        choices=["auto", "block", "layer"],
        default="auto",
        help="what --layers removes as one: layers, or blocks (auto: blocks of llama, mistral and qwen3)",
    )
    result.add_argument(
        "--depth-score",
        choices=["layer", "parameter"],
        default="layer",
        help="rank by what is lost for each layer, or for each parameter, that goes",
    )
    result.add_argument(
        "--depth-tokens",
        type=int | None,
        metavar="N",
        help="calibration tokens of a round of the ranking (default: about a minute's)",
    )
    add_device_flag(result, what="where scores are measured")
    result.add_argument(
        "--no-outgoing-norm",
        action="store_true",
        help="scores by activation alone, not times the norm of the weights that read it",
    )
    result.renamed({**RENAMED, "--layers-by": "--depth-importance", "--plain": "--no-outgoing-norm"})
    return result


def add_calibration_flags(parser: jsonargparse.ArgumentParser, samples: int) -> None:
    """How many calibration documents are read, and how much of each; their old names are in RENAMED."""
    parser.add_argument(
        "--num-calibration-samples",
        type=int,
        default=samples,
        metavar="N",
        help="at most so many of these documents",
    )
    parser.add_argument(
        "--max-calibration-length",
        type=int,
        default=512,
        metavar="N",
        help="at most so many tokens of each document",
    )


def run(arguments: jsonargparse.Namespace) -> None:
    """Prune, and print the shape before and after."""
    from nanohybrid.checkpoint import load_config
    from nanohybrid.estimate import Footprint
    from nanohybrid.prune.prunable import known_axes
    from nanohybrid.prune.stage import PruneRecipe, prune
    from nanohybrid.prune.target import Target, sizes_of

    given = {axis: getattr(arguments, name_of(one.flag)) for axis, one in known_axes().items()}
    target = Target(
        arguments.layers,
        numbers("--drop-layers", arguments.drop_layers),
        {axis: size for axis, size in given.items() if size is not None},
    )
    if target == Target():
        raise InputError(
            f"nothing is to go: give --drop-layers or a size ({', '.join([LAYERS, *size_flags()])})"
        )
    recipe = PruneRecipe(
        target,
        not arguments.no_outgoing_norm,
        arguments.num_calibration_samples,
        arguments.max_calibration_length,
        arguments.depth_importance,
        arguments.depth_unit,
        arguments.depth_score,
        arguments.depth_tokens,
    )
    device = usable_device(arguments.device)
    out = prune(recipe, arguments.path, arguments.out, arguments.importance, arguments.calibration, device)
    before, after = load_config(arguments.path), load_config(out)
    shapes = [
        {
            "parameters": Footprint.of(config).parameters,
            "pattern": config.pattern,
            "num_hidden_layers": config.num_hidden_layers,
            **{axis: getattr(config, axis) for axis in sizes_of(before) if hasattr(config, axis)},
        }
        for config in (before, after)
    ]
    if arguments.json:
        print_json({"out": out, "parent": shapes[0], "pruned": shapes[1]})
    else:
        table(
            ["", "base model", "pruned"],
            [[field, size, shapes[1].get(field, "")] for field, size in shapes[0].items()],
            title=str(out),
        )


def size_flags() -> dict[str, str]:
    """Flag -> help of each axis that can be pruned, those of kinds of layers that were registered before the
    command too."""
    if "nanohybrid.model.mixers" not in sys.modules:
        return SIZES
    from nanohybrid.prune.prunable import known_axes

    own = {one.flag: f"{one.label} to keep" for one in known_axes().values()}
    return SIZES | {flag: what for flag, what in own.items() if flag not in SIZES}


def name_of(flag: str) -> str:
    """The attribute of the parsed arguments that holds a flag's value."""
    return flag.removeprefix("--").replace("-", "_")


def numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """`2,5` as numbers, each once. Raises InputError for anything else."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else ()
    except ValueError:
        raise InputError(f"{flag} is {text!r}: give numbers with commas between, as in 2,5") from None
