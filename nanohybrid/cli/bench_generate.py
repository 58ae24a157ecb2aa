"""`nanohybrid bench generate`: prefill and decode of one model, against what the machine's memory and arithmetic allow."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, print_json, table
from nanohybrid.cli.source import open_model
from nanohybrid.errors import InputError

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "prefill and decode of one model, as parts of what this machine's memory and arithmetic give"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench generate", SUMMARY)
    result.add_argument("path", type=Path, nargs="?", metavar="PATH", help="a checkpoint directory")
    result.add_argument("--preset", metavar="NAME", help="a configuration by name instead; with --random-weights")
    result.add_argument("--random-weights", action="store_true", help="weights at random: speed does not depend on them")
    result.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of each prompt")
    result.add_argument("--new-tokens", type=int, default=64, metavar="N", help="written after each, 2 at least")
    result.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once")
    kinds = ["checkpoint", "bf16", "int8", "int4", "fp8", "fp32"]
    result.add_argument("--dtype", choices=kinds, default="bf16", help="of the weights; int8, int4, fp8: quantised while loading")
    result.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1")
    result.add_argument("--threads", type=int, metavar="N", help="on a CPU (default: as many as torch takes)")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Measure and tell."""
    import torch
    from rich.progress import Progress

    from nanohybrid.headline.generate import REPEATS, Job, measure

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"--threads is {arguments.threads}; it must be at least 1")
        torch.set_num_threads(arguments.threads)
    _complete(arguments)
    llm = open_model(arguments)
    job = Job(arguments.prompt_tokens, arguments.new_tokens, arguments.batch)
    with Progress(disable=arguments.json, transient=True) as bar:
        task = bar.add_task("measuring", total=REPEATS + 1)
        figures = measure(llm, job, lambda: bar.advance(task))
    if arguments.json:
        print_json(figures)
        return 0
    rows = [[name.replace("_", " "), _told(value)] for name, value in figures.items()]
    table(["what", "found"], rows)
    return 0


def _complete(arguments: "jsonargparse.Namespace") -> None:
    """What `open_model` asks for beside these flags."""
    quantised = arguments.dtype in ("int8", "int4", "fp8")
    more = {
        "quantize": arguments.dtype if quantised else None, "max_running": arguments.batch, "seed": 0,
        "speculate": 0, "state_dtype": "fp32", "kv_dtype": "auto",
    }  # fmt: skip
    if quantised:
        arguments.dtype = "bf16"
    for name, value in more.items():
        arguments[name] = value


def _told(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['median']:,.1f}  ({value['min']:,.1f} to {value['max']:,.1f})"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
