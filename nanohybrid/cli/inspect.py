"""`nanohybrid inspect`: what a model is, what it weighs and what fits in a memory, without reading a
weight.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import DTYPES, FORMATS, command_parser, precision, print_json, spelled, table
from nanohybrid.cli.model_flags import add_shape_flags, check_shape, locate
from nanohybrid.errors import InputError
from nanohybrid.estimate.units import GIB, size

if TYPE_CHECKING:
    import jsonargparse
    import torch

    from nanohybrid.config import HybridConfig
    from nanohybrid.estimate import Footprint

SUMMARY = "layers, parameters, memory; what fits where"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("inspect", SUMMARY)
    add_shape_flags(result)
    result.add_argument(
        "--budget-gib",
        type=float,
        default=22.0,
        metavar="G",
        help="memory to fit, 1 GiB = 2^30 bytes (default 22, an A10G's)",
    )
    result.add_argument(
        "--context", type=int, metavar="N", help="tokens a sequence (default: the model's longest)"
    )
    result.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once")
    precisions = ["checkpoint", *DTYPES, *FORMATS]
    what = (
        "of weights and keys; int8, int4, fp8: of the matrices, all else bf16 (default: as stored, else bf16)"
    )
    result.add_argument("--dtype", choices=precisions, default="checkpoint", help=what)
    return result


@dataclass(frozen=True)
class Subject:
    """What is looked at: a configuration, and the types and bytes of its weights where they are on the
    disk.
    """

    config: "HybridConfig"
    dtype: "torch.dtype"
    format: str | None  # of its matrices, where they are quantized
    loaded_bytes: int | None  # None: there are no weights, or they are to be cast
    weights: str
    layouts: dict[str, int] = field(default_factory=dict)  # of quantized matrices, as the files call them


def run(arguments: "jsonargparse.Namespace") -> int:
    """Print the model's shape, parameters, bytes, and what fits."""
    _check(arguments)
    locate(arguments, weights=False)
    from nanohybrid.estimate import Footprint

    subject = _open(arguments)
    footprint = Footprint.of(subject.config, subject.dtype, format=subject.format)
    if subject.loaded_bytes is not None:
        footprint = replace(footprint, weight_bytes=subject.loaded_bytes)
    context = arguments.context or subject.config.max_position_embeddings
    figures = fit(footprint, int(arguments.budget_gib * GIB), context, arguments.batch)
    if arguments.json:
        print_json(as_json(subject, footprint, figures))
    else:
        show(subject, footprint, figures)
    return 0


def fit(footprint: "Footprint", budget: int, context: int, batch: int) -> dict[str, Any]:
    """Whether `batch` sequences of `context` tokens fit `budget` bytes, and how long and how many would."""
    total = footprint.total(context, batch)
    return {
        "context": context, "batch": batch, "budget_bytes": budget, "total_bytes": total,
        "fits": total <= budget,
        "max_context": footprint.max_context(budget, batch),
        "max_batch": footprint.max_batch(budget, context),
    }  # fmt: skip


def as_json(subject: Subject, footprint: "Footprint", figures: dict[str, Any]) -> dict[str, Any]:
    """Everything that people see, for machines. An unbounded time_step_limit or max_context is null."""
    config = subject.config.as_dict()
    config["time_step_limit"] = [
        bound if bound < float("inf") else None for bound in subject.config.time_step_limit
    ]
    dtype = spelled(subject.dtype, format=subject.format)
    said = {"dtype": dtype, "weights": subject.weights, "layouts": subject.layouts}
    return {"config": config, **said, **asdict(footprint), **figures}


def show(subject: Subject, footprint: "Footprint", figures: dict[str, Any]) -> None:
    """The same as a strip and tables."""
    from rich.console import Console
    from rich.text import Text

    config, console = subject.config, Console(highlight=False)
    strip = Text()
    for mixer in config.mixers:
        strip.append(mixer.symbol, style=f"bold white on {mixer.color}")
    console.print(strip)
    console.print(_legend(config), style="dim")
    table(("shape", ""), _shape_rows(config))
    print()
    total = footprint.parameters
    rows = [
        (part, f"{count:,}", f"{100 * count / total:.1f} %")
        for part, count in footprint.parameters_by_part.items()
    ]
    table(("parameters", "", "share"), [*rows, ("all", f"{total:,}", "")])
    print()
    dtype = spelled(subject.dtype, format=subject.format)
    if subject.layouts:
        print("matrices in the files: " + ", ".join(f"{n} x {name}" for name, n in subject.layouts.items()))
    memory = [
        (f"weights, {dtype} ({subject.weights})", size(footprint.weight_bytes)),
        ("keys and values, each token", size(footprint.kv_bytes_per_token)),
        ("states, each sequence", size(footprint.state_bytes_per_sequence)),
        (f"in all, {figures['batch']} x {figures['context']:,} tokens", size(figures["total_bytes"])),
    ]
    table(("memory", ""), memory)
    print()
    budget, longest = size(figures["budget_bytes"]), figures["max_context"]
    verdict = [
        (f"{figures['batch']} x {figures['context']:,} tokens fit", "yes" if figures["fits"] else "no"),
        (
            f"longest context, batch {figures['batch']}",
            "unbounded: no attention" if longest is None else f"{longest:,}",
        ),
        (f"largest batch, {figures['context']:,} tokens each", f"{figures['max_batch']:,}"),
    ]
    table((f"in {budget}", ""), verdict)


def _open(arguments: "jsonargparse.Namespace") -> Subject:
    import torch

    from nanohybrid.checkpoint import CheckpointReader, load_config
    from nanohybrid.checkpoint.reader import has_weights
    from nanohybrid.gguf import is_gguf
    from nanohybrid.presets import preset

    chosen, format = precision(arguments.dtype)
    if arguments.preset is not None:
        return Subject(preset(arguments.preset), chosen or torch.bfloat16, format, None, "a preset has none")
    if not has_weights(arguments.path):
        return Subject(
            load_config(arguments.path), chosen or torch.bfloat16, format, None, "none beside config.json"
        )
    with CheckpointReader(arguments.path) as reader:
        found = "all tensors there and of their shape"
        if is_gguf(arguments.path):
            found = f"from {', '.join(reader.kinds)}"
        if chosen is not None:
            return Subject(reader.config, chosen, format, None, found)
        formats = list(reader.packable.values())  # of a GGUF file, which stay in these
        format = reader.format or max(formats, key=formats.count, default=None)
        layouts = dict(Counter(reader.layouts.values()))
        return Subject(reader.config, reader.common_dtype, format, reader.weight_bytes(), found, layouts)


def _check(arguments: "jsonargparse.Namespace") -> None:
    check_shape(arguments)
    if not 0 < arguments.budget_gib < 2**30:
        raise InputError(f"--budget-gib is {arguments.budget_gib}; it must be positive")
    for name in ("context", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")


def _legend(config: "HybridConfig") -> str:
    kinds = [
        f"{mixer.symbol} {mixer.label} x {config.mixers.count(mixer)}"
        for mixer in dict.fromkeys(config.mixers)
    ]
    return f"{config.num_hidden_layers} layers: {', '.join(kinds)}"


def _shape_rows(config: "HybridConfig") -> list[tuple[str, str]]:
    rows = [
        (
            "vocabulary x width",
            f"{config.vocab_size:,} x "
            f"{config.hidden_size:,}{', head tied' if config.tie_word_embeddings else ''}",
        ),
        ("longest context trained", f"{config.max_position_embeddings:,}"),
    ]
    rows += [(mixer.label, mixer.describe(config)) for mixer in dict.fromkeys(config.mixers)]
    return rows
