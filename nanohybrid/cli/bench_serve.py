"""`nanohybrid bench serve URL`: throughput and latency of a server under load, as its clients see them."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import API_KEY, command_parser, print_json, table
from nanohybrid.errors import InputError

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.bench.serve_load import Job

SUMMARY = "a server under load: throughput, time to the first token and for each token"


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench serve", SUMMARY)
    result.add_argument(
        "url",
        metavar="URL",
        help="http://127.0.0.1:8000; also another server with /v1/completions and /tokenize",
    )
    result.add_argument(
        "--rates",
        metavar="R,...",
        help="open loop: requests per second, at the times of a Poisson process",
    )
    result.add_argument(
        "--concurrency", metavar="N,...", help="closed loop: clients, each with one request at a time"
    )
    result.add_argument("--requests", type=int, default=64, metavar="N", help="requests at each level")
    result.add_argument(
        "--prompt-tokens",
        default="256",
        metavar="LENGTH",
        help="256, 64:512 (uniform), ~256 (log-normal with this median)",
    )
    result.add_argument("--output-tokens", default="64", metavar="LENGTH", help="the same for answers")
    result.add_argument(
        "--prefix-tokens",
        type=int,
        default=0,
        metavar="N",
        help="length of a prefix that all prompts share, in addition",
    )
    result.add_argument(
        "--model", metavar="NAME", help="the model's name (default: the first that the server lists)"
    )
    result.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of lengths, prompts and arrival times"
    )
    result.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures")
    result.add_argument("--plot", type=Path, metavar="FILE", help="plot the latencies: .svg or .png")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Measure every level. After Ctrl-C the levels that were measured are reported (exit code 130)."""
    from nanohybrid.extras import require

    require("httpx", "serve")
    rates, clients, job = _read(arguments)

    from nanohybrid.bench.serve_load import Load
    from nanohybrid.bench.serve_report import picture, summary
    from nanohybrid.stages.progress import progress

    levels = len(rates) + len(clients)
    interrupted = False
    with progress("bench", levels * job.requests, unit="requests") as bar:
        load = Load(job, lambda point: bar.advance(level=point.rate or point.clients))
        try:
            asyncio.run(load.run(rates, clients))
        except KeyboardInterrupt:
            interrupted = True
    results = [summary(point) for point in load.points if point.seen]
    report = {
        "url": job.url,
        "model": load.model,
        "interrupted": interrupted,
        "requests": job.requests,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "prefix_tokens": job.prefix,
        "seed": job.seed,
        "levels": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None and results:
        picture(results, load.model).savefig(arguments.plot, facecolor="white")
    if arguments.json:
        print_json(report)
    elif results:
        _show(results)
    if interrupted:
        print("nanohybrid: stopped; the levels that were measured are above", file=sys.stderr)
    return 130 if interrupted else 1 if any(level["completed"] == 0 for level in results) else 0


def _show(results: list[dict[str, Any]]) -> None:
    def spread(times: dict[str, float]) -> str:
        return " / ".join(f"{times[key] * 1000:,.1f}" for key in times) or "-"

    rows = [
        [
            f"{level['rate']:g}/s" if level["rate"] is not None else f"{level['clients']} clients",
            f"{level['completed']} of {level['requests']}",
            ", ".join(f"{count} x {kind}" for kind, count in level["errors"].items()) or "none",
            f"{level['output_tokens_per_second']:,.1f}",
            spread(level["ttft"]),
            spread(level["tpot"]),
        ]
        for level in results
    ]
    table(
        [
            "load",
            "completed",
            "errors",
            "tokens/s",
            "first token, ms (p50 / 90 / 99)",
            "each token, ms (p50 / 90 / 99)",
        ],
        rows,
    )


def _read(arguments: "jsonargparse.Namespace") -> "tuple[list[float], list[int], Job]":
    from nanohybrid.bench.serve_load import Job, Lengths

    rates, clients = _numbers(arguments.rates, "--rates"), _numbers(arguments.concurrency, "--concurrency")
    if not rates and not clients:
        raise InputError("give --rates R,... (requests a second) or --concurrency N,... (requests at once)")
    if any(count != int(count) for count in clients):
        raise InputError(f"--concurrency is {arguments.concurrency!r}; give whole numbers")
    for name, least in (("requests", 1), ("prefix_tokens", 0)):
        if arguments[name] < least:
            raise InputError(f"--{name.replace('_', '-')} is {arguments[name]}; it must be at least {least}")
    if arguments.plot is not None and arguments.plot.suffix not in (".svg", ".png"):
        raise InputError(f"--plot {arguments.plot}: the name must end in .svg or .png")
    for path in (arguments.out, arguments.plot):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: there is no directory {path.parent}")
    if not arguments.url.startswith(("http://", "https://")):
        raise InputError(f"{arguments.url!r} is not the address of a server: give http://HOST:PORT")
    job = Job(
        url=arguments.url.rstrip("/").removesuffix("/v1"),
        requests=arguments.requests,
        prompt=Lengths.parse(arguments.prompt_tokens),
        output=Lengths.parse(arguments.output_tokens),
        prefix=arguments.prefix_tokens,
        seed=arguments.seed,
        key=os.environ.get(API_KEY, "").strip() or None,
        model=arguments.model,
    )
    return rates, [int(count) for count in clients], job


def _numbers(text: str | None, flag: str) -> list[float]:
    try:
        values = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if not all(0 < value < 1e6 for value in values):
        raise InputError(f"{flag} is {text!r}; give numbers above 0, with commas between")
    return values
