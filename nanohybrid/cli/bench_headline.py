"""`nanohybrid bench headline`: the 9B against Qwen3-8B in one memory, at the paper's four mixes of lengths."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanohybrid.cli.common import command_parser, print_json, table

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.compress.devices import Device
    from nanohybrid.headline import Planned

SUMMARY = "the 9B against Qwen3-8B in one memory: what fits, the roofline, and measured on this machine"
QUANTISED = ("int8", "int4")


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("bench headline", SUMMARY)
    result.add_argument("--roofline", metavar="NAME", help="only plan, for a device by name (a10g, l4, h100, h200, ...) at true shapes")
    result.add_argument("--device", default="cpu", metavar="DEVICE", help="where to measure: cpu, cuda")
    result.add_argument(
        "--scale", type=int, metavar="F", help="divide widths and lengths by F, the cap by F^2 (default: 8 on a CPU, else 1)"
    )
    result.add_argument("--cap-gib", type=float, default=22.0, metavar="G", help="memory at true shapes, 1 GiB = 2^30 bytes")
    result.add_argument("--mixes", metavar="IN/OUT,...", help="some of 1k/1k, 8k/1k, 8k/16k, 128k/1k (default: all)")
    result.add_argument("--quantised", choices=["none", *QUANTISED], default="int8", help="the hybrid's second form, beside bf16")
    result.add_argument("--threads", type=int, metavar="N", help="of torch, on a CPU")
    result.add_argument("--out", type=Path, metavar="FILE.json", help="every figure")
    result.add_argument("--plot", type=Path, metavar="FILE", help="a picture: .svg or .png")
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Plan every contender at every mix, measure unless only the roofline is asked for, and tell."""
    from nanohybrid.cli.source import set_threads, usable_device
    from nanohybrid.compress.devices import device as profile
    from nanohybrid.headline import contenders, mixes, plan
    from nanohybrid.headline.contest import cap
    from nanohybrid.stages.plain import to_json

    scale = arguments.scale or (8 if arguments.device == "cpu" and arguments.roofline is None else 1)
    set_threads(arguments.threads)
    chosen = mixes(None if arguments.mixes is None else arguments.mixes.split(","), scale)
    models = contenders(["bf16", *([] if arguments.quantised == "none" else [arguments.quantised])], scale)
    bytes_ = cap(arguments.cap_gib, scale)
    if arguments.roofline is not None:
        machine = profile(arguments.roofline)
    else:
        from nanohybrid.headline.measure import this_machine

        machine = this_machine(usable_device(arguments.device))
    rows = [plan(model, mix, bytes_, machine, scale) for mix in chosen for model in models]
    measured = None if arguments.roofline is not None else _measure(rows, arguments.device, scale)
    result = as_json(rows, measured, machine, scale, bytes_)
    if arguments.out is not None:
        from nanohybrid.files import atomic_write

        atomic_write(arguments.out, to_json(result) + "\n")
    if arguments.plot is not None:
        _plot(result, arguments.plot)
    if arguments.json:
        print_json(result)
    else:
        show(result)
    return 0


def _measure(rows: "list[Planned]", device: str, scale: int) -> list[float | None]:
    """Output tokens per second of each row; the contenders take turns at each mix."""
    from nanohybrid.headline.measure import Runner
    from nanohybrid.stages.progress import progress

    runners: dict[str, Runner] = {}
    result: list[float | None] = []
    with progress("headline", sum(row.sequences * row.mix.context for row in rows), "tok") as bar:
        for row in rows:
            if row.sequences and row.label not in runners:
                runners[row.label] = Runner(row.contender, device)
            result.append(runners[row.label].output_tokens_per_second(row, scale) if row.sequences else None)
            bar.advance(row.sequences * row.mix.context, mix=row.mix.name)
    return result


def as_json(rows: "list[Planned]", measured: list[float | None] | None, machine: "Device", scale: int, cap_bytes: int) -> dict[str, Any]:
    """Every figure: what fits, the roofline's and the measured tokens per second, and how many times the Transformer's."""
    entries: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        spoken = None if measured is None else measured[index]
        entries.append(
            {
                "mix": row.mix.name, "model": row.contender.name, "dtype": row.contender.dtype, "input_tokens": row.mix.inputs,
                "output_tokens": row.mix.outputs, "sequences": row.sequences, "decode_roofline": row.decode, "roofline": row.output,
                "output_tokens_per_second": spoken, "fraction": spoken / row.output if spoken else None,
            }
        )  # fmt: skip
    for entry in entries:
        dense = next(other for other in entries if other["mix"] == entry["mix"])
        entry["roofline_ratio"] = entry["roofline"] / dense["roofline"] if dense["roofline"] else None
        both = entry["output_tokens_per_second"] and dense["output_tokens_per_second"]
        entry["ratio"] = entry["output_tokens_per_second"] / dense["output_tokens_per_second"] if both else None
    return {
        "scale": scale, "cap_bytes": cap_bytes, "machine": machine.name, "bandwidth_gb_per_second": machine.bandwidth / 1e9,
        "matmul_gflops": machine.flops / 1e9, "rows": entries,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """The same as a table."""

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    rows = [
        (
            entry["mix"], f"{entry['model']} {entry['dtype']}", entry["sequences"] or "no fit",
            f"{entry['roofline']:,.1f}" if entry["sequences"] else "", times(entry["roofline_ratio"]),
            "" if entry["output_tokens_per_second"] is None else f"{entry['output_tokens_per_second']:,.1f}",
            "" if entry["fraction"] is None else f"{entry['fraction']:.0%}", times(entry["ratio"]),
        )
        for entry in result["rows"]
    ]  # fmt: skip
    table(("in/out", "model", "at once", "roofline", "", "measured", "of it", ""), rows)
    rates = f"{result['bandwidth_gb_per_second']:,.1f} GB/s, {result['matmul_gflops']:,.0f} GFLOP/s"
    memory = f"{result['cap_bytes'] / 2**30:.2f} GiB, widths and lengths divided by {result['scale']}"
    print(f"\noutput tokens per second; {result['machine']}: {rates}; {memory}")


def _plot(result: dict[str, Any], file: Path) -> None:
    from nanohybrid.stages.plots import bars

    figure_of = "output_tokens_per_second" if any(entry["fraction"] for entry in result["rows"]) else "roofline"
    names = list(dict.fromkeys(f"{entry['model']} {entry['dtype']}" for entry in result["rows"]))
    labels = list(dict.fromkeys(entry["mix"] for entry in result["rows"]))
    series = {name: [entry[figure_of] or 0.0 for entry in result["rows"] if f"{entry['model']} {entry['dtype']}" == name] for name in names}
    title = "Output tokens per second in one memory" + (", at best" if figure_of == "roofline" else "")
    bars(labels, series, "tokens per second", title).savefig(file)
