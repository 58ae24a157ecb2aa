"""`nanohybrid plan train`: what a training step needs in memory, before a weight is made."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, print_json, table
from nanohybrid.cli.model_flags import add_shape_flags, check_shape
from nanohybrid.errors import InputError

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "what a training step on a CPU needs in memory"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("plan train", SUMMARY)
    add_shape_flags(result)
    result.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="tokens of a step")
    result.add_argument("--mode", choices=["fp32", "bf16"], default="bf16", help="of the matrix products")
    result.add_argument(
        "--activation-checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="recompute the activations of every N-th layer in the backward pass; 0 saves all activations",
    )
    result.renamed({"--checkpoint-every": "--activation-checkpoint-every"})
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Print the bytes of each part, and of all at the worst moment."""
    from nanohybrid.presets import preset

    check_shape(arguments)
    if arguments.batch_tokens < 1:
        raise InputError(f"--batch-tokens is {arguments.batch_tokens}; it must be at least 1")
    every = arguments.activation_checkpoint_every
    if every < 0:
        raise InputError(f"--activation-checkpoint-every is {every}; it must be 0 or more")
    from nanohybrid.checkpoint import load_config
    from nanohybrid.estimate.training import PROCESS, TrainingMemory
    from nanohybrid.estimate.units import size

    config = preset(arguments.preset) if arguments.path is None else load_config(arguments.path)
    memory = TrainingMemory.of(config, arguments.batch_tokens, arguments.mode, every)
    if arguments.json:
        print_json(asdict(memory))
        return 0
    rows = [
        ("weights, fp32", size(memory.weight_bytes)),
        ("gradients", size(memory.gradient_bytes)),
        ("Adam's two moments", size(memory.moment_bytes)),
        *([("matrices in bf16", size(memory.cast_bytes))] if memory.cast_bytes else []),
        (f"activations of {arguments.batch_tokens:,} tokens", size(memory.kept_bytes)),
        ("head's gradient and a chunk of its work", size(memory.loss_bytes)),
        ("one layer's backward", size(memory.working_bytes)),
        ("the process itself, about", size(PROCESS)),
    ]
    table(
        ("part", ""),
        rows,
        title=f"at most {size(memory.peak_bytes)} at once: not all parts are held at the same time",
    )
    return 0
