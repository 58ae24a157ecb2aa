"""Medians over the rounds, the table and the plot."""

import statistics
from pathlib import Path
from typing import Any

from engines import SPEEDS, Measured, Workload

PEER_TYPES = {"int8": "int8 / q8_0", "int4": "int4 / q4_0"}


def aggregate(rows: list[Measured], workloads: dict[str, Workload]) -> list[dict[str, Any]]:
    """For each metric, workload, format and engine: the median of the rounds' medians, and the extremes."""
    result = []
    for name, workload in workloads.items():
        for figure, title in _figures(name, workload):
            groups: dict[tuple[str, str], list[Measured]] = {}
            for row in rows:
                if row.workload == name:
                    groups.setdefault((row.kind, row.engine), []).append(row)
            for (kind, engine), group in groups.items():
                spreads: list[Any] = [row.values[figure] for row in group]
                result.append(
                    {
                        "measure": title, "type": kind, "engine": engine, "limit": _limit(group, figure),
                        "median": statistics.median(s["median"] for s in spreads),
                        "min": min(s["min"] for s in spreads), "max": max(s["max"] for s in spreads),
                        "peak_memory_bytes": max(int(row.values["peak_memory_bytes"]) for row in group),  # type: ignore[call-overload]
                    }
                )  # fmt: skip
    return result


def _figures(name: str, workload: Workload) -> list[tuple[str, str]]:
    """The reported speeds of a workload with their titles: those that its name mentions."""
    titles = {SPEEDS[0]: f"prefill {workload.prompt_tokens:,}", SPEEDS[1]: f"decode, batch {workload.batch}"}
    return [(figure, title) for figure, title in titles.items() if figure.split("_")[0] in name]


def _limit(group: list[Measured], figure: str) -> float | None:
    """The machine's limit, where the engine measured it in the same run, as ours does."""
    fraction = {SPEEDS[0]: "prefill_matmul_fraction", SPEEDS[1]: "decode_bandwidth_fraction"}[figure]
    limits = [
        row.values[figure]["median"] / row.values[fraction] for row in group if row.values.get(fraction)
    ]  # type: ignore[index]
    return statistics.median(limits) if limits else None


def markdown(result: dict[str, Any]) -> str:
    """A table with a row for each metric and format and a column for each engine, and the machine."""
    engines = list(result["engines"])
    lines = [
        f"| tokens per second | {' | '.join(['type', *engines, 'ahead of the next'])} |",
        f"|{'---|' * (len(engines) + 3)}",
    ]
    cells = {(row["measure"], row["type"], row["engine"]): row for row in result["results"]}
    for measure, kind in dict.fromkeys((row["measure"], row["type"]) for row in result["results"]):
        here = [cells.get((measure, kind, engine)) for engine in engines]
        lines.append(
            f"| {measure} | {' | '.join([PEER_TYPES.get(kind, kind), *map(_cell, here), _lead(here)])} |"
        )
    machine = result["machine"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {result['date']},"
        f" {result['rounds']} rounds",
    ]
    lines += [f"- {name}: {_as_text(versions)}" for name, versions in result["engines"].items()]
    lines += [f"- {name} is left out: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join([*lines, "", f"`{result['command']}`", ""])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    share = f", {row['median'] / row['limit']:.0%} of the limit" if row["limit"] else ""
    return f"{row['median']:.1f} [{row['min']:.1f}-{row['max']:.1f}]{share}"


def _lead(row: list[dict[str, Any] | None]) -> str:
    """The first engine's speed relative to the best of the others."""
    first, *others = row
    rivals = [other["median"] for other in others if other is not None]
    return f"{first['median'] / max(rivals):.2f}x" if first is not None and rivals else ""


def _as_text(versions: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in versions.items())
        if isinstance(versions, dict)
        else str(versions)
    )


def plot(result: dict[str, Any], file: Path) -> None:
    """A panel for each metric: bars with their spread, and the machine's limit as a line."""
    from matplotlib.figure import Figure

    from nanohybrid.stages.plots import COLORS, style
    from nanohybrid.stages.report import INK

    rows = result["results"]
    measures, engines = list(dict.fromkeys(row["measure"] for row in rows)), list(result["engines"])
    with style():
        figure = Figure(figsize=(3.0 * len(measures), 3.4), layout="constrained")
        for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
            here = [row for row in rows if row["measure"] == measure]
            kinds = list(dict.fromkeys(row["type"] for row in here))
            for row in here:
                place = kinds.index(row["type"]) + 0.27 * (
                    engines.index(row["engine"]) - (len(engines) - 1) / 2
                )
                spread = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
                axes.bar(
                    place,
                    row["median"],
                    0.25,
                    yerr=spread,
                    color=COLORS[engines.index(row["engine"])],
                    ecolor=INK,
                )
                if row["limit"]:
                    axes.hlines(
                        row["limit"],
                        kinds.index(row["type"]) - 0.45,
                        kinds.index(row["type"]) + 0.45,
                        INK,
                        "dashed",
                        linewidth=1,
                    )
            axes.set_xticks(range(len(kinds)), kinds)
            axes.set_title(f"{measure}, tok/s")
        handles = [figure.axes[0].bar(0, 0, color=COLORS[index]) for index in range(len(engines))]
        figure.legend(handles, engines, loc="outside lower center", ncols=len(engines))
        figure.savefig(file)
