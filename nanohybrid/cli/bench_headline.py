"""`nanohybrid bench headline`: the 9B against Qwen3-8B in one memory, at the paper's four mixes of lengths."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import command_parser, print_json, table
from nanohybrid.cli.model_flags import add_device_flag, set_threads, usable_device

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.bench.result import Result, Settings

SUMMARY = "the 9B against Qwen3-8B in one memory: what fits, the roofline, and measured on this machine"
QUANTIZED = ("int8", "int4")


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench headline", SUMMARY)
    result.add_argument(
        "--roofline",
        metavar="NAME",
        help="only plan, for a device by name (a10g, l4, h100, h200, ...) at true shapes",
    )
    add_device_flag(result, what="where to measure")
    result.add_argument(
        "--scale",
        type=int,
        metavar="F",
        help="divide widths and lengths by F, the cap by F^2 (default: 8 on a CPU, else 1)",
    )
    result.add_argument(
        "--cap-gib", type=float, default=22.0, metavar="G", help="memory at true shapes, 1 GiB = 2^30 bytes"
    )
    result.add_argument(
        "--mixes", metavar="IN/OUT,...", help="some of 1k/1k, 8k/1k, 8k/16k, 128k/1k (default: all)"
    )
    result.add_argument(
        "--quantized",
        choices=["none", *QUANTIZED],
        default="int8",
        help="the hybrid's second form, beside bf16",
    )
    result.add_argument("--threads", type=int, metavar="N", help="of torch, on a CPU")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="keep every row as it is measured, then a table and a picture"
    )
    result.add_argument("--resume", action="store_true", help="go on with what --out holds")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Plan every contender at every mix, measure unless only the roofline is asked for, and tell; 130 after Ctrl-C."""
    from nanohybrid.bench.result import HEADERS, Result, cells, footnote
    from nanohybrid.estimate.devices import device as profile
    from nanohybrid.extras import require

    machine = None if arguments.roofline is None else profile(arguments.roofline)
    result = Result(_settings(arguments), arguments.out, arguments.resume)
    if arguments.out is not None:
        require("matplotlib", "train")  # said now, and not after minutes of measuring
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
        kept = (
            ""
            if arguments.out is None
            else f", kept in {arguments.out}: the same command with --resume goes on"
        )
        print(f"nanohybrid: stopped after {len(result.rows)} rows{kept}", file=sys.stderr)
    return 130 if interrupted else 0


def _settings(arguments: "jsonargparse.Namespace") -> "Settings":
    from nanohybrid.bench import mixes
    from nanohybrid.bench.result import Settings

    set_threads(arguments.threads)
    import torch

    here = arguments.roofline is None
    device = usable_device(arguments.device) if here else arguments.roofline
    scale = (8 if here and device == "cpu" else 1) if arguments.scale is None else arguments.scale
    names = [mix.name for mix in mixes(None if arguments.mixes is None else arguments.mixes.split(","))]
    dtypes = ["bf16", *([] if arguments.quantized == "none" else [arguments.quantized])]
    return Settings(scale, arguments.cap_gib, names, dtypes, device, torch.get_num_threads())


def _measure(result: "Result") -> None:
    """Time every row that fits and is not kept yet."""
    from nanohybrid.bench.measure import Extent, Runner, this_machine
    from nanohybrid.bench.result import key
    from nanohybrid.bench.roofline import plan
    from nanohybrid.stages.progress import progress

    settings = result.settings
    machine = this_machine(settings.device)
    rows = [
        plan(contender, mix, settings.cap_bytes, machine, settings.scale)
        for contender, mix in settings.pairs()
    ]
    rows = [row for row in rows if row.sequences]
    left = [row for row in rows if key(row.contender, row.mix) not in result.rows]
    weights = [Extent.of(row).seconds(row) + 1.0 for row in left]  # a second for all that is not timed
    runners: dict[str, Runner] = {}
    with progress("headline", len(rows), "rows", len(rows) - len(left)) as bar:
        for row, weight in zip(left, weights, strict=True):
            share = len(left) * weight / sum(weights)
            bar.advance(0, mix=row.mix.name, model=row.label)
            if row.label not in runners:
                if settings.scale == 1:
                    runners.clear()  # at true shapes a memory holds one model
                runners[row.label] = Runner(row.contender, settings.device)
            timed = runners[row.label].time(
                row,
                settings.scale,
                lambda part, share=share: bar.advance(part * share),  # type: ignore[misc]
            )
            result.keep(key(row.contender, row.mix), timed)
