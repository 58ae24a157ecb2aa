"""`nanohybrid verify`: checks that a model gives the same numbers however it is run."""

import math
import sys
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import DTYPES, command_parser, print_json, table
from nanohybrid.cli.model_flags import add_choice_flags, check_choice, locate, usable_device

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.model import HybridLM
    from nanohybrid.verify import CheckResult

SUMMARY = "check that every executor, packing, chunking, caching and saving give the same numbers"
PRECISIONS = {**DTYPES, "fp64": "float64"}  # fp64 tells a defect from rounding


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("verify", SUMMARY)
    add_choice_flags(result)
    choices = ["checkpoint", *PRECISIONS]
    result.add_argument(
        "--dtype",
        choices=choices,
        default="checkpoint",
        help="precision of the weights (default: as stored, else fp32)",
    )
    result.add_argument("--seed", type=int, default=0, metavar="S", help="of the random text and weights")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Print a line for each check; 1 where one failed."""
    check_choice(arguments)
    from nanohybrid.verify import verify

    lines = []
    for line in verify(_open(arguments), arguments.seed):
        print(f"{line.what}: {_verdict(line)}", file=sys.stderr, flush=True)
        lines.append(line)
    passed = all(line.passed for line in lines)
    if arguments.json:
        print_json({"passed": passed, "checks": [as_json(line) for line in lines]})
    else:
        headers = ("check", "on", "differs", "allowed", "memoryless", "")
        table(headers, [as_row(line) for line in lines])
        print(
            'Largest differences, of logits relative to the largest one; "memoryless": of a model that '
            "forgets. See docs/verify.md."
        )
    return 0 if passed else 1


def as_json(line: "CheckResult") -> dict[str, Any]:
    """One check for machines. A difference that is not finite is null."""
    difference = line.difference if math.isfinite(line.difference) else None
    return {
        "what": line.what, "on": line.on, "difference": difference, "tolerance": line.tolerance,
        "memoryless": line.memoryless, "telling": line.telling, "passed": line.passed,
    }  # fmt: skip


def as_row(line: "CheckResult") -> tuple[str, ...]:
    """One check for people."""
    memoryless = "" if line.memoryless is None else f"{line.memoryless:.1e}"
    return line.what, line.on, f"{line.difference:.1e}", f"{line.tolerance:.1e}", memoryless, _verdict(line)


def _verdict(line: "CheckResult") -> str:
    if not line.passed:
        return "FAIL"
    return "pass" if line.telling else "pass (a model that forgets would too)"


def _open(arguments: "jsonargparse.Namespace") -> "HybridLM":
    import torch

    dtype = getattr(torch, PRECISIONS[arguments.dtype]) if arguments.dtype in PRECISIONS else None
    device = usable_device(arguments.device)
    locate(arguments)
    if arguments.path is not None:
        from nanohybrid.checkpoint import load

        return load(arguments.path, dtype, device)
    from nanohybrid.engine.random_weights import random_model
    from nanohybrid.presets import preset

    return random_model(preset(arguments.preset), dtype or torch.float32, arguments.seed, device)
