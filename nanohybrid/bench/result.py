"""What a contest came to: rows kept as they are measured, in a file that a killed run goes on from, and what is told of them.

DIR/result.json    settings, what was measured, and all that follows from it; written beside and renamed after each row
DIR/result.md      the table
DIR/result.svg     the picture
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nanohybrid.bench.comparison import Contender, Mix, cap, contenders, mixes
from nanohybrid.bench.measure import Timed
from nanohybrid.bench.roofline import output_rate, plan
from nanohybrid.errors import InputError
from nanohybrid.estimate.devices import Device
from nanohybrid.extras import require
from nanohybrid.files import atomic_write
from nanohybrid.stages.lineage import made_with
from nanohybrid.stages.plain import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT, TABLE, PICTURE = "result.json", "result.md", "result.svg"
Key = tuple[str, str, str]  # mix, model, precision
HEADERS = ("in/out", "model", "at once", "tokens/s", "at best", "reached")


@dataclass(frozen=True)
class Settings:
    """What a contest is about; rows of two contests with the same settings can stand in one table."""

    scale: int
    cap_gib: float
    mixes: list[str]
    dtypes: list[str]
    device: str
    threads: int

    @property
    def cap_bytes(self) -> int:
        return cap(self.cap_gib, self.scale)

    def pairs(self) -> list[tuple[Contender, Mix]]:
        """The rows, mix by mix, so that the contenders of a ratio are measured one after another."""
        models = contenders(self.dtypes, self.scale)
        return [(model, mix) for mix in mixes(self.mixes, self.scale) for model in models]


class Result:
    """Settings and the rows that were measured so far. With a directory, each is written as it comes."""

    def __init__(self, settings: Settings, directory: Path | None = None, resume: bool = False) -> None:
        """Raises InputError where the directory holds a result that is not to be resumed, or one of other settings."""
        self.settings, self.directory = settings, directory
        self.rows: dict[Key, Timed] = {}
        if directory is None:
            if resume:
                raise InputError("--resume goes on with what a directory holds: give it by --out DIR")
            return
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file: give a directory to --out")
        if (directory / RESULT).exists():
            if not resume:
                raise InputError(
                    f"{directory / RESULT} exists: add --resume to go on with it, or give another --out"
                )
            self.rows = _read(directory / RESULT, settings)

    def keep(self, key: Key, timed: Timed) -> None:
        """Add a row, and write all."""
        self.rows[key] = timed
        self.write()

    def write(self, report: dict[str, Any] | None = None) -> None:
        """Write result.json, where there is a directory."""
        if self.directory is not None:
            atomic_write(
                self.directory / RESULT, to_json(self.report() if report is None else report, indent=1) + "\n"
            )

    def publish(self, report: dict[str, Any]) -> None:
        """Write everything: figures, table and picture."""
        if self.directory is not None:
            self.write(report)
            atomic_write(self.directory / TABLE, markdown(report))
            with require("matplotlib", "train").rc_context(
                {"svg.fonttype": "none", "svg.hashsalt": PICTURE}
            ):  # text as text, same bytes
                picture(report).savefig(self.directory / PICTURE, facecolor="white", metadata={"Date": None})

    def report(self, machine: Device | None = None) -> dict[str, Any]:
        """Every figure of every row. Rooflines are those of `machine`, else of the median of the rates that were measured, so that
        their ratios compare shapes and not minutes; the fraction that a row reached is by the rates around itself."""
        if machine is None:
            rates = [(timed.bandwidth, timed.flops) for timed in self.rows.values()]
            machine = Device("this machine", 0, *map(median, zip(*rates, strict=True))) if rates else None
        entries = [self._entry(contender, mix, machine) for contender, mix in self.settings.pairs()]
        for entry in entries:
            dense = next(other for other in entries if other["mix"] == entry["mix"])
            for name, of in (("ratio", "output_tokens_per_second"), ("roofline_ratio", "roofline")):
                entry[name] = entry[of] / dense[of] if entry[of] and dense[of] else None
        return {
            "settings": asdict(self.settings), "cap_bytes": self.settings.cap_bytes,
            "machine": None if machine is None else machine.name,
            "bandwidth_gb_per_second": None if machine is None else machine.bandwidth / 1e9,
            "matmul_gflops": None if machine is None else machine.flops / 1e9,
            "made_with": made_with(), "rows": entries,
            "measured": [{"key": list(key), **asdict(timed)} for key, timed in self.rows.items()],
        }  # fmt: skip

    def _entry(self, contender: Contender, mix: Mix, machine: Device | None) -> dict[str, Any]:
        settings = self.settings
        row = plan(contender, mix, settings.cap_bytes, machine or Device("none", 0, 1.0, 1.0), settings.scale)
        timed, reached, fraction = self.rows.get(key(contender, mix)), None, None
        if timed is not None:
            around = Device("this machine", 0, timed.bandwidth, timed.flops)
            reached = output_rate(row.sequences, mix, timed.prompt, timed.step)
            fraction = reached / plan(contender, mix, settings.cap_bytes, around, settings.scale).output
        return {
            "mix": mix.name, "model": contender.name, "dtype": contender.dtype, "input_tokens": mix.inputs, "output_tokens": mix.outputs,
            "sequences": row.sequences, "roofline": row.output if machine and row.sequences else None,
            "decode_roofline": row.decode if machine and row.sequences else None, "output_tokens_per_second": reached,
            "decode_tokens_per_second": row.sequences / timed.step if timed else None, "fraction": fraction,
        }  # fmt: skip


def key(contender: Contender, mix: Mix) -> Key:
    """By what a row is known."""
    return mix.name, contender.name, contender.dtype


def _read(file: Path, settings: Settings) -> dict[Key, Timed]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        before = Settings(**found["settings"])
        rows = {tuple(one.pop("key")): Timed(**one) for one in found["measured"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{file} is no result of bench headline: give another --out") from None
    for name, value in asdict(before).items():
        if value != getattr(settings, name):
            raise InputError(
                f"{file} was measured with {name} {value}, this is {getattr(settings, name)}: give the same, or another --out"
            )
    return rows


def cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows, under HEADERS."""

    def told(value: float | None, ratio: float | None) -> str:
        number = "" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        return number if ratio is None else f"{number} ({ratio:.2f}x)"

    return [
        (
            entry["mix"], f"{entry['model']} {entry['dtype']}", str(entry["sequences"] or "does not fit"),
            told(entry["output_tokens_per_second"], entry["ratio"]), told(entry["roofline"], entry["roofline_ratio"]),
            "" if entry["fraction"] is None else f"{entry['fraction']:.0%}",
        )
        for entry in report["rows"]
    ]  # fmt: skip


def footnote(report: dict[str, Any]) -> str:
    """What the table is of, and by which rates."""
    memory = (
        f"{report['cap_bytes'] / 2**30:.2f} GiB, widths and lengths divided by {report['settings']['scale']}"
    )
    if report["machine"] is None:
        return f"Nothing is measured yet; {memory}."
    rates = f"{report['bandwidth_gb_per_second']:,.1f} GB/s, {report['matmul_gflops']:,.0f} GFLOP/s"
    return f"Output tokens per second; {report['machine']}: {rates}; {memory}."


def markdown(report: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [HEADERS, ("---",) * len(HEADERS), *cells(report)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{footnote(report)}\n"


def picture(report: dict[str, Any]) -> Figure:
    """Bars of what was measured, a whisker on each up to its roofline; of rooflines alone where nothing was."""
    from nanohybrid.stages.plots import bars

    rows = report["rows"]
    measured = any(entry["output_tokens_per_second"] for entry in rows)
    series: dict[str, list[float]] = {}
    reach: dict[str, list[tuple[float, float]]] = {}
    for entry in rows:
        name = f"{entry['model']} {entry['dtype']}"
        best = entry["roofline"] or 0.0
        height = (entry["output_tokens_per_second"] or 0.0) if measured else best
        series.setdefault(name, []).append(height)
        reach.setdefault(name, []).append((0.0, max(best - height, 0.0) if height else 0.0))
    title = "Output tokens per second in one memory" + (", and the roofline's" if measured else ", at best")
    labels = list(dict.fromkeys(entry["mix"] for entry in rows))
    return bars(labels, series, "tokens per second", title, errors=reach if measured else None, log_y=True)
