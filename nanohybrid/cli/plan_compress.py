"""`nanohybrid plan compress`: the shapes that a model can be pruned to within a memory."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import FORMATS, command_parser, print_json, table
from nanohybrid.cli.model_flags import add_shape_flags, check_shape
from nanohybrid.errors import InputError
from nanohybrid.estimate.units import GIB

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.compress.plan import Plan
    from nanohybrid.config import HybridConfig
    from nanohybrid.estimate.budget import Budget
    from nanohybrid.estimate.devices import Device
    from nanohybrid.prune.target import Target

SUMMARY = "the shapes that a model can be pruned to within a memory"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("plan compress", SUMMARY)
    add_shape_flags(result)
    result.add_argument(
        "--budget-gib",
        type=float | None,
        metavar="G",
        help="memory for the model at inference (default: that of --device)",
    )
    result.add_argument(
        "--device",
        metavar="NAME",
        help="a10g, l4, rtx4090, h100, h200 or cpu: whose speed is estimated (default a10g)",
    )
    result.add_argument(
        "--reserved-gib",
        type=float,
        default=0.0,
        metavar="G",
        help="memory of the device that the model may not use, as for a vision encoder",
    )
    result.add_argument(
        "--context",
        type=int | None,
        metavar="N",
        help="tokens of each sequence (default: the model's longest)",
    )
    result.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once")
    result.add_argument(
        "--dtype", choices=["bf16", *FORMATS], default="bf16", help="of the matrices of the layers"
    )
    result.add_argument(
        "--quantize-head", action="store_true", help="count an untied head in this format too"
    )
    result.add_argument(
        "--importance",
        type=Path,
        metavar="FILE",
        help="measured scores of this model, to rank by instead of a prior",
    )
    result.add_argument("--show", type=int, default=20, metavar="N", help="rows of the table; --json has all")
    result.renamed({"--beside-gib": "--reserved-gib"})
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Print every shape that fits, by the estimate of its quality."""
    from nanohybrid.presets import preset

    check_shape(arguments)
    from nanohybrid.checkpoint import load_config
    from nanohybrid.compress.plan import plan
    from nanohybrid.estimate.devices import device
    from nanohybrid.prune.importance import Importance

    base = preset(arguments.preset) if arguments.path is None else load_config(arguments.path)
    profile = device(arguments.device or "a10g")
    budget = _budget(arguments, base, profile)
    scores = None if arguments.importance is None else Importance.load(arguments.importance)
    found = plan(base, budget, profile, scores)
    if arguments.json:
        print_json(_as_json(budget, profile, found))
    else:
        _show(budget, profile, found, arguments.show)
    return 0


def _budget(arguments: "jsonargparse.Namespace", base: "HybridConfig", profile: "Device") -> "Budget":
    """The memory that the model may use: as given, or that of the device."""
    from nanohybrid.estimate.budget import STEP, Budget

    given, reserved = arguments.budget_gib, arguments.reserved_gib
    if given is None and arguments.device is None:
        raise InputError("give the memory: --budget-gib G, or --device a10g|l4|rtx4090|h100|h200|cpu")
    if given is not None and not 1 / GIB <= given < 2**30:
        raise InputError(f"--budget-gib is {given}; it must be positive")
    if not 0 <= reserved < 2**30 or (given is not None and reserved):
        raise InputError(
            f"--reserved-gib is {reserved}: it is subtracted from the memory of a --device, not from "
            "--budget-gib, "
            "and cannot be negative"
        )
    left = int(given * GIB) if given is not None else profile.budget(int(reserved * GIB))
    if left < 1:
        raise InputError(
            f"--reserved-gib is {reserved}: {profile.name} has {profile.budget() / GIB:.2f} GiB for "
            "the model and all else"
        )
    context = base.max_position_embeddings if arguments.context is None else arguments.context
    for name, value in (("context", context), ("batch", arguments.batch)):
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
    return Budget(left, context, arguments.batch, arguments.dtype, STEP, arguments.quantize_head)


def _as_json(budget: "Budget", profile: "Device", found: "Plan") -> dict[str, object]:
    return {
        "budget_bytes": budget.bytes,
        "context": budget.context,
        "batch": budget.batch,
        "dtype": budget.dtype,
        "device": profile.name,
        "quality_estimate": found.estimate,
        "candidates": [shape.as_dict() for shape in found.shapes],
        "rejected_count": found.rejected,
    }


def _show(budget: "Budget", profile: "Device", found: "Plan", rows: int) -> None:
    from nanohybrid.compress.search import shape_of
    from nanohybrid.prune.prunable import known_axes

    headers = ["shape", "params", "weights", "KV, state", "all GiB", "tok/s", "quality"]
    cells = []
    for shape in found.shapes[: max(rows, 1)]:
        memory = shape.memory
        gib = [f"{part / GIB:.2f}" for part in (memory.weights, memory.kv + memory.state, memory.total)]
        sizes = "/".join(map(str, shape_of(shape.config).values()))
        count, speed = f"{shape.parameters / 1e9:.2f} B", f"{shape.tokens_per_second:.3g}"
        cells.append([sizes, count, *gib, speed, f"{shape.quality:.3f}"])
    labels = [known_axes()[name].label for name in list(shape_of(found.shapes[0].config))[1:]]
    table(headers, cells, title=f"{len(found.shapes)} shapes fit {budget}; {found.rejected} are too large")
    print(f"\nshape: {'/'.join(['layers', *labels])}. all GiB: with the activations of a step.")
    print(f"tok/s: an upper bound, all sequences together, on {profile.name}, each with its whole context.")
    print(f"quality: {found.estimate}.")
    print(f"the first: {command(found.shapes[0].target)}")


def command(target: "Target") -> str:
    """The command that prunes to a shape."""
    from nanohybrid.prune.prunable import known_axes

    flags = [f"--drop-layers {','.join(map(str, target.drop_layers))}"] if target.drop_layers else []
    flags += [f"{known_axes()[axis].flag} {size}" for axis, size in target.sizes.items()]
    if not flags:
        return "the whole model; nothing needs to be removed"
    return f"nanohybrid prune PATH --out DIR {' '.join(flags)} --calibration DIR"
