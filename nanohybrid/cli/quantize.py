"""`nanohybrid quantize`: a checkpoint to the same with its matrices in 8 or 4 bits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import FORMATS, MODEL, command_parser, print_json, table
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.cli.prune import RENAMED, add_calibration_flags

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "a model -> the same with its matrices in int8, int4 or FP8"


def parser() -> "jsonargparse.ArgumentParser":
    from nanohybrid.tasks import DEFAULT_MIX

    result = command_parser("quantize", SUMMARY)
    result.add_argument("path", type=Path, metavar="PATH", help=MODEL)
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="the output directory")
    result.add_argument(
        "--to", choices=FORMATS, required=True, help="int8 and fp8: half the bytes of bf16; int4: 28 percent"
    )
    result.add_argument(
        "--quantize-head",
        action="store_true",
        help="quantize an untied head too; SGLang, and vLLM in fp8, may refuse it",
    )
    result.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="documents for int4's scales and for the comparison: token stores, or JSON lines with text",
    )
    add_calibration_flags(result, samples=128)
    result.add_argument(
        "--problems",
        type=int,
        default=0,
        metavar="N",
        help="held-out problems of each task on which both models are evaluated",
    )
    result.add_argument(
        "--tasks",
        type=tuple[str, ...],
        default=DEFAULT_MIX,
        metavar="[NAME, ...]",
        help="the tasks of these problems",
    )
    add_device_flag(result)
    result.renamed(RENAMED)
    return result


def run(arguments: "jsonargparse.Namespace") -> None:
    """Quantize, and print bytes and quality before and after."""
    from nanohybrid.quantize.stage import QuantizeRecipe, quantize_stage
    from nanohybrid.stages.output import read_record

    recipe = QuantizeRecipe(
        arguments.to,
        arguments.quantize_head,
        arguments.num_calibration_samples,
        arguments.max_calibration_length,
        arguments.problems,
        tuple(arguments.tasks),
    )
    out = quantize_stage(
        recipe, arguments.path, arguments.out, arguments.calibration, usable_device(arguments.device)
    )
    measures = read_record(out)["measures"]
    if arguments.json:
        print_json({"out": out, **measures})
    else:
        table(["", "before", "after"], rows(measures), title=f"{out}, in {arguments.to}")


def rows(measures: dict[str, Any]) -> list[list[str]]:
    """The table for people."""
    from nanohybrid.estimate.units import amount

    result = [["bytes", amount(measures["bytes_before"]), amount(measures["bytes_after"])]]
    result += [[f"  {kind}", *map(amount, pair)] for kind, pair in measures["bytes_by_kind"].items()]
    if "perplexity_before" in measures:
        change = f"{measures['perplexity_after']:.4f} ({measures['perplexity_change']:+.3%})"
        result.append(["perplexity", f"{measures['perplexity_before']:.4f}", change])
        result.append(
            ["same most probable token", "", f"{measures['top1_agreement']:.2%} of {measures['targets']:,}"]
        )
        result.append(["KL divergence, nats", "", f"{measures['kl_divergence']:.2e}"])
    if "accuracy" in measures:
        result.append(["accuracy", *(f"{found['accuracy']:.1%}" for found in measures["accuracy"].values())])
    result.append(["error of the weights", "", f"{measures['weight_error']:.2%}"])
    if measures["not_quantized"]:
        result.append(["not quantized", "", f"{len(measures['not_quantized'])} matrices"])
    return result
