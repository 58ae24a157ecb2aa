"""`nanohybrid bench compare`: the 9B against Qwen3-8B in the same memory, on the paper's four workloads."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, print_json, table
from nanohybrid.cli.model_flags import add_device_flag, set_threads, usable_device

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.bench.result import Result, Settings

SUMMARY = "the 9B against Qwen3-8B in the same memory: sequences that fit, roofline, and measured speed"
QUANTIZED = ("int8", "int4")


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench compare", SUMMARY)
    result.add_argument(
        "--roofline",
        metavar="NAME",
        help="plan only, for a named device (a10g, l4, h100, h200, ...) at full size",
    )
    add_device_flag(result, what="where to measure")
    result.add_argument(
        "--scale",
        type=int,
        metavar="F",
        help="divide widths and lengths by F, the memory limit by F^2 (default: 8 on a CPU, else 1)",
    )
    result.add_argument(
        "--memory-gib",
        type=float,
        default=22.0,
        metavar="G",
        help="memory limit at full size, 1 GiB = 2^30 bytes",
    )
    result.add_argument(
        "--workloads", metavar="IN/OUT,...", help="some of 1k/1k, 8k/1k, 8k/16k, 128k/1k (default: all)"
    )
    result.add_argument(
        "--quantized",
        choices=["none", *QUANTIZED],
        default="int8",
        help="the second format of the hybrid, beside bf16",
    )
    result.add_argument("--threads", type=int, metavar="N", help="of torch, on a CPU")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="write each row when it is measured, then a table and a plot"
    )
    result.add_argument("--resume", action="store_true", help="continue the result in --out")
    result.renamed({"--cap-gib": "--memory-gib", "--mixes": "--workloads"})
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Plan and measure every candidate on every workload, and print a table. Exit code 130 after Ctrl-C."""
    from nanohybrid.bench.result import HEADERS, Result, cells, footnote
    from nanohybrid.estimate.devices import device as profile
    from nanohybrid.extras import require

    machine = None if arguments.roofline is None else profile(arguments.roofline)
    result = Result(_settings(arguments), arguments.out, arguments.resume)
    if arguments.out is not None:
        require("matplotlib", "train")  # fail before minutes of measuring
    interrupted = False
    if machine is None:
        try:
            _measure(result)
        except KeyboardInterrupt:
            interrupted = True
    report = result.report(machine)
    result.publish(report)
    if arguments.json:
        print_json(report)
    else:
        table(HEADERS, cells(report))
        print(f"\n{footnote(report)}")
    if interrupted:
        where = f"; {arguments.out} holds them, and --resume continues" if arguments.out else ""
        print(f"nanohybrid: stopped after {len(result.rows)} rows{where}", file=sys.stderr)
    return 130 if interrupted else 0


def _settings(arguments: "jsonargparse.Namespace") -> "Settings":
    from nanohybrid.bench import workloads
    from nanohybrid.bench.result import Settings

    set_threads(arguments.threads)
    import torch

    here = arguments.roofline is None
    device = usable_device(arguments.device) if here else arguments.roofline
    scale = (8 if here and device == "cpu" else 1) if arguments.scale is None else arguments.scale
    names = [
        workload.name
        for workload in workloads(None if arguments.workloads is None else arguments.workloads.split(","))
    ]
    dtypes = ["bf16", *([] if arguments.quantized == "none" else [arguments.quantized])]
    return Settings(scale, arguments.memory_gib, names, dtypes, device, torch.get_num_threads())


def _measure(result: "Result") -> None:
    """Time every row that fits and has not been measured."""
    from nanohybrid.bench.measure import Runner, TimedPart, this_machine
    from nanohybrid.bench.result import key
    from nanohybrid.bench.roofline import plan
    from nanohybrid.stages.progress import progress

    settings = result.settings
    machine = this_machine(settings.device)
    rows = [
        plan(candidate, workload, settings.memory_limit_bytes, machine, settings.scale)
        for candidate, workload in settings.pairs()
    ]
    rows = [row for row in rows if row.sequences]
    left = [row for row in rows if key(row.candidate, row.workload) not in result.rows]
    weights = [TimedPart.of(row).seconds(row) + 1.0 for row in left]  # one second for work that is not timed
    runners: dict[str, Runner] = {}
    with progress("compare", len(rows), "rows", len(rows) - len(left)) as bar:
        for row, weight in zip(left, weights, strict=True):
            share = len(left) * weight / sum(weights)
            bar.advance(0, workload=row.workload.name, model=row.label)
            if row.label not in runners:
                if settings.scale == 1:
                    runners.clear()  # full size: one model in memory at a time
                runners[row.label] = Runner(row.candidate, settings.device)
            timed = runners[row.label].time(
                row,
                settings.scale,
                lambda part, share=share: bar.advance(part * share),  # type: ignore[misc]
            )
            result.add(key(row.candidate, row.workload), timed)
