"""`nanohybrid bench generate`: prefill and decode speed of one model, against the machine's roofline."""

from typing import TYPE_CHECKING

from nanohybrid.cli.common import FORMATS, command_parser, print_json, table
from nanohybrid.cli.model_flags import add_choice_flags, open_model, set_threads

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "prefill and decode speed of one model, as fractions of this machine's memory and arithmetic rates"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench generate", SUMMARY)
    add_choice_flags(result)
    result.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of each prompt")
    result.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens written after each, at least 2"
    )
    result.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once")
    result.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="repetitions; 1 for a very long prompt"
    )
    kinds = ["checkpoint", "bf16", *FORMATS, "fp32"]
    result.add_argument(
        "--dtype",
        choices=kinds,
        default="bf16",
        help="of the weights; int8, int4, fp8: quantized while loading",
    )
    result.add_argument("--threads", type=int, metavar="N", help="threads on a CPU (default: torch's)")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Measure, and print the figures."""
    from rich.progress import Progress

    from nanohybrid.bench.generate import Job, measure

    set_threads(arguments.threads)
    others = {
        "max_num_seqs": arguments.batch,
        "seed": 0,
        "num_speculative_tokens": 0,
        "mamba_ssm_cache_dtype": "fp32",
        "kv_cache_dtype": "auto",
    }
    for name, value in others.items():  # flags of `generate` that this command does not have
        arguments[name] = value
    llm = open_model(arguments)
    job = Job(arguments.prompt_tokens, arguments.new_tokens, arguments.batch, arguments.repeats)
    with Progress(disable=arguments.json, transient=True) as bar:
        task = bar.add_task("measuring", total=job.repeats + 1)
        figures = measure(llm, job, lambda: bar.advance(task))
    if arguments.json:
        print_json(figures)
        return 0
    rows = [[name.replace("_", " "), _as_text(value)] for name, value in figures.items()]
    table(["figure", "value"], rows)
    return 0


def _as_text(value: object) -> str:
    match value:
        case dict():
            return f"{value['median']:,.1f}  ({value['min']:,.1f} to {value['max']:,.1f})"
        case float():
            return f"{value:,.2f}"
        case int():
            return f"{value:,}"
    return str(value)
