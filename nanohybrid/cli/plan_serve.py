"""`nanohybrid plan serve`: how many requests of which length fit in a memory, before a weight is read."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import DTYPES, FORMATS, command_parser, print_json, spelled, table
from nanohybrid.cli.model_flags import (
    add_cache_dtype_flags,
    add_shape_flags,
    add_speculation_flag,
    check_shape,
    check_speculation,
    chosen_precision,
    locate,
)
from nanohybrid.errors import InputError
from nanohybrid.estimate.serving import PAGE, STEP_TOKENS, plan_serve
from nanohybrid.estimate.units import size

if TYPE_CHECKING:
    import jsonargparse
    import torch

    from nanohybrid.config import HybridConfig
    from nanohybrid.estimate import Footprint
    from nanohybrid.estimate.serving import ServePlan

RENAMED = {
    "--context": "--max-model-len",
    "--max-running": "--max-num-seqs",
    "--step-tokens": "--max-num-batched-tokens",
    "--cache-gib": "--prefix-cache-gib",
}
SUMMARY = "how many requests of which length fit in a memory"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("plan serve", SUMMARY)
    add_shape_flags(result)
    result.add_argument(
        "--memory-gib",
        type=float,
        required=True,
        metavar="G",
        help="memory for everything, 1 GiB = 2^30 bytes",
    )
    result.add_argument(
        "--max-model-len",
        type=int | None,
        metavar="N",
        help="tokens of each request (default: the model's longest)",
    )
    result.add_argument(
        "--max-num-seqs",
        type=int | None,
        metavar="N",
        help="requests at once, at most (default: what fits)",
    )
    result.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=STEP_TOKENS,
        metavar="N",
        help="tokens that one step computes at most",
    )
    result.add_argument(
        "--prefix-cache-gib",
        type=float,
        default=0.0,
        metavar="G",
        help="part of the memory that the prefix cache takes (on a CPU)",
    )
    result.renamed(RENAMED)
    add_cache_dtype_flags(result)
    add_speculation_flag(result)
    precisions = ["checkpoint", *DTYPES, *FORMATS]
    what = "of weights, keys and values (default: as stored, else bf16); a format means --quantize"
    result.add_argument("--dtype", choices=precisions, default="checkpoint", help=what)
    result.add_argument(
        "--quantize", choices=list(FORMATS), help="format of the matrices, with all else in bf16"
    )
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Print slots, pages and the bytes of each part."""
    _check(arguments)
    locate(arguments, weights=False)
    config, dtype, footprint = opened(arguments)
    plan = plan_serve(
        config,
        footprint,
        int(arguments.memory_gib * 2**30),
        arguments.max_model_len or config.max_position_embeddings,
        arguments.max_num_seqs,
        arguments.max_num_batched_tokens,
        int(arguments.prefix_cache_gib * 2**30),
        arguments.num_speculative_tokens,
    )
    if arguments.json:
        print_json(facts(plan, dtype))
    else:
        title, rows = lines(plan, footprint, dtype)
        table(("memory", ""), rows, title=title)
    return 0


def facts(plan: "ServePlan", dtype: str) -> dict[str, Any]:
    """A plan as JSON fields."""
    return {**asdict(plan), "total_bytes": plan.total_bytes, "free_bytes": plan.free_bytes, "dtype": dtype}


def lines(plan: "ServePlan", footprint: "Footprint", dtype: str) -> tuple[str, list[tuple[str, str]]]:
    """A plan as text: its title, and (part, size) of the memory."""
    state, page = size(footprint.state_bytes_per_sequence), size(PAGE * footprint.kv_bytes_per_token)
    rows = [
        (f"weights, {dtype}", size(plan.weight_bytes)),
        (f"states: {plan.slots:,} slots of {state}", size(plan.state_bytes)),
        (f"keys and values: {plan.pages:,} pages of {PAGE} tokens, {page} each", size(plan.kv_bytes)),
        (f"a step of {plan.step_tokens:,} tokens, at most", size(plan.transient_bytes)),
        *([("prefix cache", size(plan.cache_bytes))] if plan.cache_bytes else []),
        ("the process itself, at most", size(plan.process_bytes)),
        *([("left", size(plan.free_bytes))] if plan.free_bytes else []),
    ]
    if plan.aside_bytes:
        rows.append(("preempted requests, at most, beside the budget", size(plan.aside_bytes)))
    return f"{plan.slots:,} requests of {plan.context:,} tokens at once in {size(plan.budget_bytes)}", rows


def opened(
    arguments: "jsonargparse.Namespace", otherwise: "Callable[[HybridConfig], torch.dtype] | None" = None
) -> "tuple[HybridConfig, str, Footprint]":
    """The configuration, the name of the precision, and the bytes that weights and sequences take.

    Stored weights count as they are stored. Where there are none and no flag gives the precision, `otherwise`
    does; without it, bf16.
    """
    import torch

    from nanohybrid.checkpoint import CheckpointReader, load_config
    from nanohybrid.checkpoint.reader import has_weights
    from nanohybrid.estimate import Footprint
    from nanohybrid.model.spec import KV_DTYPES, STATE_DTYPES
    from nanohybrid.presets import preset

    memory = STATE_DTYPES[arguments.mamba_ssm_cache_dtype], KV_DTYPES[arguments.kv_cache_dtype]
    chosen, format = chosen_precision(arguments)
    if arguments.preset is not None or not has_weights(arguments.path):
        config = preset(arguments.preset) if arguments.path is None else load_config(arguments.path)
        kind = chosen or (otherwise(config) if otherwise else torch.bfloat16)
        return config, spelled(kind, format), Footprint.of(config, kind, *memory, format=format)
    with CheckpointReader(arguments.path) as reader:
        kind, weights = chosen or reader.common_dtype, reader.weight_bytes(chosen, format)
        footprint = replace(Footprint.of(reader.config, kind, *memory), weight_bytes=weights)
        return reader.config, spelled(kind, reader.format or format), footprint


def _check(arguments: "jsonargparse.Namespace") -> None:
    check_speculation(arguments.num_speculative_tokens)
    check_shape(arguments)
    if not 0 < arguments.memory_gib < 2**30:
        raise InputError(f"--memory-gib is {arguments.memory_gib}; it must be positive")
    if not 0 <= arguments.prefix_cache_gib < 2**30:
        raise InputError(f"--prefix-cache-gib is {arguments.prefix_cache_gib}; it must be 0 or more")
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
