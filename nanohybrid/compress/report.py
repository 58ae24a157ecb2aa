"""A compression as a page: what there was room for, what mattered, what was tried, what was kept, and how well it healed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanohybrid.compress.budget import Budget
from nanohybrid.compress.importance import Importance
from nanohybrid.compress.search import SHAPE, Candidate, Search
from nanohybrid.config import KINDS, HybridConfig
from nanohybrid.model import Footprint
from nanohybrid.stages import Report, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
ROWS = 12  # candidates in the table
POINTS = 200  # points of a curve of sorted scores


def compression_report(
    budget: Budget, parent: HybridConfig, scores: Importance, found: Search, losses: dict[str, float], directory: Path
) -> Report:
    """The report of the stage whose directory this is."""
    report = Report("nanohybrid compress")
    _summary(report, budget, parent, found.chosen, losses)
    _importance(report, parent, scores)
    _candidates(report, budget, found)
    _distillation(report, directory)
    return report


def _summary(report: Report, budget: Budget, parent: HybridConfig, chosen: Candidate, losses: dict[str, float]) -> None:
    before, after = budget.memory(parent).as_dict(), budget.memory(chosen.config).as_dict()
    count = Footprint.of(parent).parameters
    report.text(
        f"The budget was {budget}. The parent takes {before['total'] / MIB:,.2f} MiB, the result {after['total'] / MIB:,.2f} MiB, with "
        f"{chosen.parameters:,} of {count:,} parameters ({chosen.parameters / count:.0%}). Loss on the calibration documents: parent "
        f"{losses['parent']:.4f}, pruned {losses['pruned']:.4f}, distilled {losses['distilled']:.4f}."
    )
    report.figure(plots.strip({"parent": parent.pattern, "result": chosen.config.pattern}), "The layers of both.")
    report.table(["", "parent", "result"], [[name, getattr(parent, name), getattr(chosen.config, name)] for name in SHAPE])
    series = {
        name: [table[part] / MIB for part in ("weights", "kv", "state", "total")] for name, table in (("parent", before), ("result", after))
    }
    figure = plots.bars(["weights", "keys and values", "states", "total"], series, "MiB")
    figure.axes[0].axhline(budget.bytes / MIB, color=plots.COLOURS[2], linewidth=1.2)
    report.figure(figure, "Memory by what it holds; the line is the budget.")
    by_part = Footprint.of(chosen.config).parameters_by_part
    report.table(
        ["parameters of", "parent", "result"], [[p, n, by_part.get(p, 0)] for p, n in Footprint.of(parent).parameters_by_part.items()]
    )


def _importance(report: Report, parent: HybridConfig, scores: Importance) -> None:
    facts = scores.facts
    times = ", times the norm of the weights that read them" if facts.get("outgoing") else ""
    report.section("What matters").text(
        f"Measured on {facts['samples']} documents of {facts['tokens']:,} tokens (`{facts['calibration']}`): mean activation over a "
        f"sequence, L2 over documents{times}. A curve that falls steeply is an axis with much to spare.{_stability(facts)}"
    )
    curves = {"embedding": scores.embedding} | {f"FFN {layer}": values for layer, values in scores.ffn.items()}
    report.figure(_sorted(curves, "embedding channels and FFN neurons"), "Scores from the highest to the lowest, as shares of the highest.")
    if scores.mamba:
        channels = scores.mamba_channels()
        heads = {f"heads {layer}": scores.mamba_heads(layer, range(len(channels))) for layer in scores.mamba}
        report.figure(_sorted({"channels": channels} | heads, "Mamba heads and their channels"), "Heads of each Mamba layer, and channels.")
    if scores.attention:
        table = {f"layer {layer}": values for layer, values in scores.attention.items()}
        report.figure(_sorted(table, "attention heads"), "Query heads of each attention layer.")
    if len(scores.layers):
        labels = [f"{index} {kind}" for index, kind in enumerate(parent.pattern)]
        report.figure(
            plots.bars(labels, {"change": scores.layers.tolist()}, "mean squared change of the logits"),
            f"What skipping one layer alone changes. The order in which they would go: {', '.join(map(str, scores.order))}.",
        )
        report.table(
            ["layer", "kind", "change of the logits"], [[i, KINDS[k], float(scores.layers[i])] for i, k in enumerate(parent.pattern)]
        )


def _stability(facts: Mapping[str, Any]) -> str:
    """How far the rankings on the even and on the odd documents agree, as a sentence."""
    rows = facts.get("stability") or {}
    named = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in rows.items())
    return f" Rank correlation between the scores on every other document and on the rest: {named}." if rows else ""


def _sorted(curves: dict[str, Tensor], title: str) -> Figure:
    """Scores of each name, falling, over the share of the axis; both run from 0 to 1."""
    series = {}
    for name, values in curves.items():
        ordered = values.sort(descending=True).values
        last = max(len(ordered) - 1, 1)
        places = sorted({round(i * last / POINTS) for i in range(POINTS + 1)} & set(range(len(ordered))))
        series[name] = [(place / last, float(ordered[place] / ordered[0].clamp(min=1e-30))) for place in places]
    return plots.lines(series, "share of the axis", "score", title)


def _candidates(report: Report, budget: Budget, found: Search) -> None:
    tried = [candidate for candidate in found.candidates if candidate.loss is not None]
    report.section("What was tried").text(
        f"{len(found.candidates)} shapes of the grid fit {budget}, {found.rejected} were too large. Those that no other one exceeds on "
        f"every axis were pruned and tried without retraining, those that lose least importance first: {len(tried)} of them. The lowest "
        "loss was chosen."
    )
    rows = [[*(getattr(c.config, name) for name in SHAPE), c.parameters, c.bytes["total"], c.loss] for c in tried[:ROWS]]
    report.table(["layers", "hidden", "FFN", "Mamba heads", "head channels", "query heads", "parameters", "bytes", "loss"], rows)
    report.figure(_points(tried), "Loss without retraining against memory. The line joins those that none beats in both.")


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, lower being better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _points(tried: list[Candidate]) -> Figure:
    places = [(candidate.bytes["total"] / MIB, float(candidate.loss or 0.0)) for candidate in tried]
    with plots.style():
        figure, axes = plots.canvas("MiB", "loss", "")
        axes.scatter([x for x, _ in places], [y for _, y in places], s=18, color=plots.COLOURS[0], label="tried")
        axes.plot(*zip(*pareto(places), strict=True), color=plots.COLOURS[0], linewidth=1, label="best for their size")
        axes.scatter([places[0][0]], [places[0][1]], s=60, color=plots.COLOURS[1], marker="D", label="chosen", zorder=3)
        axes.legend(loc="best", fontsize=9)
    return figure


def _distillation(report: Report, directory: Path) -> None:
    folder = directory / "distilled"
    rows = [json.loads(line) for line in (folder / "metrics" / "distill.jsonl").read_text().splitlines()]
    measures = json.loads((folder / "lineage.json").read_text())["measures"]
    report.section("Learning from the parent").text(
        f"Forward KL on the logits over {rows[-1]['tokens']:,} tokens. Divergence from the parent, in nats a token: "
        f"{measures['kl_before']:.4f} before, {measures['kl_after']:.4f} after."
    )
    curve = {"KL": [(row["tokens"], row["loss"]) for row in rows]}
    report.figure(plots.lines(curve, "tokens", "KL, nats a token", log_y=True), "Divergence from the parent on the training documents.")
    report.section("To use it").code(f"nanohybrid chat {directory.name.removesuffix('.partial')}")
