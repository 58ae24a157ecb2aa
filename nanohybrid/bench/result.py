"""The results of `bench compare`: measured rows, saved after each one so that a killed run can resume, and
reports.

DIR/result.json    settings, measurements and all derived figures; replaced atomically after each row
DIR/result.md      the table
DIR/result.svg     the picture
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nanohybrid.bench.comparison import Candidate, Workload, candidates, memory_limit, workloads
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
Key = tuple[str, str, str]  # workload, model, weight format
HEADERS = ("in/out", "model", "sequences", "tokens/s", "roofline", "fraction")
RENAMED = {"cap_gib": "memory_gib", "mixes": "workloads"}  # settings in a result.json of the last release


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison. Rows that were measured with the same settings can be in one table."""

    scale: int
    memory_gib: float
    workloads: list[str]
    dtypes: list[str]
    device: str
    threads: int

    @property
    def memory_limit_bytes(self) -> int:
        return memory_limit(self.memory_gib, self.scale)

    def pairs(self) -> list[tuple[Candidate, Workload]]:
        """All rows, ordered by workload, so that the models of a ratio are measured one after another."""
        models = candidates(self.dtypes, self.scale)
        return [(model, workload) for workload in workloads(self.workloads, self.scale) for model in models]


class Result:
    """Settings and the rows that have been measured. With a directory, each new row is written to it."""

    def __init__(self, settings: Settings, directory: Path | None = None, resume: bool = False) -> None:
        """Open a result, and read the rows of `directory` if `resume` is set.

        Raises InputError if the directory has a result and `resume` is not set, or a result with other
        settings.
        """
        self.settings, self.directory = settings, directory
        self.rows: dict[Key, Timed] = {}
        if directory is None:
            if resume:
                raise InputError("--resume continues the result in a directory; give it with --out DIR")
            return
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file; --out needs a directory")
        if (directory / RESULT).exists():
            if not resume:
                raise InputError(
                    f"{directory / RESULT} exists; add --resume to continue it, or give another --out"
                )
            self.rows = _read(directory / RESULT, settings)

    def add(self, key: Key, timed: Timed) -> None:
        """Add a row and write result.json."""
        self.rows[key] = timed
        self.write()

    def write(self, report: dict[str, Any] | None = None) -> None:
        """Write result.json, if there is a directory."""
        if self.directory is not None:
            atomic_write(
                self.directory / RESULT, to_json(self.report() if report is None else report, indent=1) + "\n"
            )

    def publish(self, report: dict[str, Any]) -> None:
        """Write result.json, the table and the plot, if there is a directory."""
        if self.directory is not None:
            self.write(report)
            atomic_write(self.directory / TABLE, markdown(report))
            # text stays text, and the same result gives the same bytes
            style = {"svg.fonttype": "none", "svg.hashsalt": PICTURE}
            with require("matplotlib", "train").rc_context(style):
                picture(report).savefig(self.directory / PICTURE, facecolor="white", metadata={"Date": None})

    def report(self, machine: Device | None = None) -> dict[str, Any]:
        """All figures of all rows, as JSON values.

        Rooflines use the rates of `machine`, or the median of all measured rates. So their ratios compare
        shapes and not the drift of the machine. The fraction of a row uses the rates measured around that
        row.
        """
        if machine is None:
            rates = [(timed.bandwidth, timed.flops) for timed in self.rows.values()]
            machine = Device("this machine", 0, *map(median, zip(*rates, strict=True))) if rates else None
        entries = [self._entry(candidate, workload, machine) for candidate, workload in self.settings.pairs()]
        for entry in entries:
            dense = next(other for other in entries if other["workload"] == entry["workload"])
            for name, of in (("ratio", "output_tokens_per_second"), ("roofline_ratio", "roofline")):
                entry[name] = entry[of] / dense[of] if entry[of] and dense[of] else None
        return {
            "settings": asdict(self.settings), "memory_limit_bytes": self.settings.memory_limit_bytes,
            "machine": None if machine is None else machine.name,
            "bandwidth_gb_per_second": None if machine is None else machine.bandwidth / 1e9,
            "matmul_gflops": None if machine is None else machine.flops / 1e9,
            "made_with": made_with(), "rows": entries,
            "measured": [{"key": list(key), **asdict(timed)} for key, timed in self.rows.items()],
        }  # fmt: skip

    def _entry(self, candidate: Candidate, workload: Workload, machine: Device | None) -> dict[str, Any]:
        settings = self.settings
        row = plan(
            candidate,
            workload,
            settings.memory_limit_bytes,
            machine or Device("none", 0, 1.0, 1.0),
            settings.scale,
        )
        timed, reached, fraction = self.rows.get(key(candidate, workload)), None, None
        if timed is not None:
            around = Device("this machine", 0, timed.bandwidth, timed.flops)
            reached = output_rate(row.sequences, workload, timed.prompt, timed.step)
            fraction = (
                reached
                / plan(candidate, workload, settings.memory_limit_bytes, around, settings.scale).output
            )
        return {
            "workload": workload.name, "model": candidate.name, "dtype": candidate.dtype,
            "input_tokens": workload.input_tokens, "output_tokens": workload.output_tokens,
            "sequences": row.sequences, "roofline": row.output if machine and row.sequences else None,
            "decode_roofline": row.decode if machine and row.sequences else None,
            "output_tokens_per_second": reached,
            "decode_tokens_per_second": row.sequences / timed.step if timed else None, "fraction": fraction,
        }  # fmt: skip


def key(candidate: Candidate, workload: Workload) -> Key:
    """The key of a row."""
    return workload.name, candidate.name, candidate.dtype


def _read(file: Path, settings: Settings) -> dict[Key, Timed]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        before = Settings(**{RENAMED.get(name, name): value for name, value in found["settings"].items()})
        rows = {tuple(one.pop("key")): Timed(**one) for one in found["measured"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{file} is not a result of bench compare; give another --out") from None
    for name, value in asdict(before).items():
        if value != getattr(settings, name):
            raise InputError(
                f"{file} was measured with {name} {value}, and this run has {getattr(settings, name)}; "
                "use the same settings, or another --out"
            )
    return rows


def cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table, with the columns of HEADERS."""

    def told(value: float | None, ratio: float | None) -> str:
        number = "" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        return number if ratio is None else f"{number} ({ratio:.2f}x)"

    return [
        (
            entry["workload"], f"{entry['model']} {entry['dtype']}",
            str(entry["sequences"] or "does not fit"),
            told(entry["output_tokens_per_second"], entry["ratio"]),
            told(entry["roofline"], entry["roofline_ratio"]),
            "" if entry["fraction"] is None else f"{entry['fraction']:.0%}",
        )
        for entry in report["rows"]
    ]  # fmt: skip


def footnote(report: dict[str, Any]) -> str:
    """The line below the table: units, machine rates, memory limit and scale."""
    scale = report["settings"]["scale"]
    memory = f"{report['memory_limit_bytes'] / 2**30:.2f} GiB, widths and lengths divided by {scale}"
    if report["machine"] is None:
        return f"No row has been measured; {memory}."
    rates = f"{report['bandwidth_gb_per_second']:,.1f} GB/s, {report['matmul_gflops']:,.0f} GFLOP/s"
    return f"Output tokens per second; {report['machine']}: {rates}; {memory}."


def markdown(report: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [HEADERS, ("---",) * len(HEADERS), *cells(report)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{footnote(report)}\n"


def picture(report: dict[str, Any]) -> Figure:
    """Bars of tokens/s with a whisker up to the roofline; bars of the rooflines if nothing was measured."""
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
    title = "Output tokens per second in the same memory" + (", and roofline" if measured else ": roofline")
    labels = list(dict.fromkeys(entry["workload"] for entry in rows))
    return bars(labels, series, "tokens per second", title, errors=reach if measured else None, log_y=True)
