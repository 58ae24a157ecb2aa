"""`nanohybrid quickstart`: the whole pipeline at a small scale, on two CPU cores."""

import sys
from pathlib import Path
from typing import Any

import jsonargparse

from nanohybrid.cli.common import command_parser, print_json, table
from nanohybrid.cli.model_flags import add_device_flag, usable_device

SUMMARY = "the whole pipeline at a small scale: raw text to a compressed, thinking model in about 15 minutes"


def parser() -> jsonargparse.ArgumentParser:
    result = command_parser("quickstart", SUMMARY)
    result.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/quickstart"), help="the output directory"
    )
    result.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiplies tokens, problems and time; from 4 on the model is larger too",
    )
    result.add_argument("--seed", type=int, default=0, help="seed of data, models and sampling")
    add_device_flag(result)
    return result


def run(arguments: jsonargparse.Namespace) -> int:
    from nanohybrid.quickstart import quickstart

    summary = quickstart(arguments.out, arguments.scale, arguments.seed, usable_device(arguments.device))
    if arguments.json:
        print_json(summary)
    else:
        show(summary)
        print(f"\nreport   {arguments.out / 'report.html'}")
        print(f"chat     {launcher()} chat {arguments.out / summary['checkpoints']['distilled']}")
    return 0


def show(summary: dict[str, Any]) -> None:
    """Print the accuracies as a table."""
    rows = [
        [name, summary["parameters"][name], f"{scores['thinking']:.1%}", f"{scores['no_thinking']:.1%}"]
        for name, scores in summary["accuracy"].items()
    ]
    minutes, gib = summary["seconds"] / 60, summary["peak_memory_gib"]
    table(
        ["model", "parameters", "thinking", "no thinking"],
        rows,
        title=f"accuracy on held-out problems ({minutes:.1f} min, {gib:.1f} GiB)",
    )


def launcher() -> str:
    """The command that started this program: the installed one, or the module."""
    return "nanohybrid" if Path(sys.argv[0]).name == "nanohybrid" else f"{sys.executable} -m nanohybrid"
