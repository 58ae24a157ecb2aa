"""A compression as a page: what there was room for, what mattered, what was tried, what was kept, and how well it healed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanohybrid.compress.budget import QUANTISED, Budget, amount
from nanohybrid.compress.importance import Importance
from nanohybrid.compress.promise import Promise
from nanohybrid.compress.report_end import through_the_stages
from nanohybrid.compress.search import SHAPE, Candidate, Search
from nanohybrid.compress.target import Target, sizes_of
from nanohybrid.config import ATTENTION, KINDS, MAMBA, MLP, HybridConfig
from nanohybrid.model import Footprint
from nanohybrid.stages import Report, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB, MIB = 2**30, 2**20
ROWS = 12  # candidates in the table
POINTS = 200  # points of a curve of sorted scores


def compression_report(
    budget: Budget, parent: HybridConfig, scores: Importance, found: Search, measures: Mapping[str, Any], directory: Path
) -> Report:
    """The report of the stage whose directory this is; `measures` are what it remembers in its lineage."""
    report = Report("nanohybrid compress")
    _summary(report, budget, parent, found.chosen, measures)
    _removed(report, parent, scores, found.chosen)
    _importance(report, parent, scores)
    _candidates(report, budget, found)
    through_the_stages(report, directory, found.chosen.config, measures)
    return report


def _summary(report: Report, budget: Budget, parent: HybridConfig, chosen: Candidate, measures: Mapping[str, Any]) -> None:
    before, after = budget.plain.memory(parent).as_dict(), budget.memory(chosen.config).as_dict()
    count, agreement, work = Footprint.of(parent).parameters, measures["agreement"], measures["at_work"]
    last = list(agreement)[-1]
    then = f" Last its matrices became {budget.dtype}." if budget.dtype in QUANTISED else ""
    speeds = [work[name].get("tokens_per_second", "no room here to run it") for name in ("parent", "result")]
    if chosen.config == parent:
        what = f"A model was to fit {budget}. It fits whole, so nothing was cut, and nothing had to be learnt again.{then}"
        alike = f"the result's likeliest next token is the parent's {agreement[last]:.1%} of the time."
    else:
        what = (
            f"A model was made smaller, so that it fits {budget}. Its least important parts were cut out, and what was left learnt from "
            f"the whole model again.{then}"
        )
        alike = (
            f"the result's likeliest next token is the parent's {agreement[last]:.1%} of the time; right after the cut it was "
            f"{agreement['pruned']:.1%}."
        )
    report.text(
        f"{what} The parent takes {amount(before['total'])}, the result {amount(after['total'])}, with {chosen.parameters:,} of {count:,} "
        f"parameters ({chosen.parameters / count:.0%}). On the documents it was measured on, {alike}"
    )
    report.figure(plots.strip({"parent": parent.pattern, "result": chosen.config.pattern}), "The layers of both.")
    parts = {"weights": "weights", "kv": "keys and values", "state": "states", "reserve": "a step", "total": "total"}
    shown = [part for part in parts if before[part]]
    unit, name = (GIB, "GiB") if before["total"] >= GIB else (MIB, "MiB")
    series = {who: [table[part] / unit for part in shown] for who, table in (("parent", before), ("result", after))}
    figure = plots.bars([parts[part] for part in shown], series, name)
    figure.axes[0].axhline(budget.bytes / unit, color=plots.COLOURS[2], linewidth=1.2)
    step = (
        f' "A step" is the reserve of the budget: what the engine computes with while it takes in {budget.step:,} tokens of a prompt, '
        "a bound from the widths of the layers."
        if budget.step
        else " The budget was a share of these, so it has no reserve for the activations of a step."
    )
    report.figure(figure, f"Memory by what it holds; the line is the budget.{step}")
    rows = [["tokens a second, measured here", *speeds]]
    for label, key in (("memory of the weights", "weight_bytes"), ("memory of keys, values and states", "state_bytes")):
        rows.append([label, *(amount(int(work[name][key])) for name in ("parent", "result"))])
    report.table(["at work", "parent", "result"], rows)
    beside = ", the parent in bf16" if then else ""
    report.text(
        f"One decode step of {budget.batch} sequence{'s' * (budget.batch > 1)} at {int(work['parent']['context']):,} tokens of context, "
        f"{budget.dtype}{beside}, in turns, the quickest of a few; bytes as allocated at the whole context. A busy machine blurs the "
        "first line."
    )


WHY = {
    "num_hidden_layers": "layers whose absence changes the output least",
    "hidden_size": "channels of the residual stream whose activations, and the weights that read them, are smallest",
    "intermediate_size": "neurons of the MLPs that fire least into weights that matter",
    "mamba_num_heads": "heads of each Mamba layer, as many in each group",
    "mamba_head_dim": "the same channels in every Mamba head",
    "num_attention_heads": "query heads, as many for each key/value head",
}


def _removed(report: Report, parent: HybridConfig, scores: Importance, chosen: Candidate) -> None:
    """What went from each axis, and the share of its measured importance that went with it."""
    promise, sizes = Promise(parent, scores), sizes_of(parent)
    report.section("What was removed, and why").text(
        "Every axis of the model was scored (next section). What scored least went, as much as the budget asked. The last column is the "
        "share of an axis' importance that went with it: squared scores for widths, the changes of the output for layers."
    )
    rows = []
    for (axis, before), shape in zip(sizes.items(), SHAPE, strict=True):
        after = getattr(chosen.config, shape)
        if before != after:
            lost = promise.lost(Target(**{axis: after}))
            rows.append([shape, before, after, f"{1 - after / before:.0%}", f"{lost:.1%}", WHY[shape]])
    if rows:
        report.table(["axis", "parent", "result", "removed", "importance lost", "what went"], rows)
    else:
        report.text("Nothing: the parent itself fits.")
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
    labels = [f"{index} {kind}" for index, kind in enumerate(parent.pattern)]
    by_cosine = facts.get("layers_by") == "cosine"
    if len(scores.layers) and not by_cosine:
        report.figure(
            plots.bars(labels, {"change": scores.layers.tolist()}, "mean squared change of the logits"),
            f"What skipping one layer alone changes. The order in which they would go: {', '.join(map(str, scores.order))}.",
        )
    if len(scores.cosine):
        order = f" The order in which they would go: {', '.join(map(str, scores.order))}." if by_cosine else ""
        report.figure(
            plots.bars(labels, {"turn": scores.cosine.tolist()}, "1 - cosine"),
            f"How far each layer turns the hidden state: a second opinion, from one pass and layer by layer.{order}",
        )
    rows = [
        [index, KINDS[kind], *(float(values[index]) if len(values) else "" for values in (scores.layers, scores.cosine))]
        for index, kind in enumerate(parent.pattern)
    ]
    report.table(["layer", "kind", "score", "1 - cosine"], rows)


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


COLUMNS = {
    "num_hidden_layers": ("layers", None), "hidden_size": ("hidden", None), "intermediate_size": ("FFN", MLP),
    "mamba_num_heads": ("Mamba heads", MAMBA), "mamba_head_dim": ("head channels", MAMBA),
    "num_attention_heads": ("query heads", ATTENTION),
}  # fmt: skip


def _candidates(report: Report, budget: Budget, found: Search) -> None:
    tried = [candidate for candidate in found.candidates if candidate.loss is not None]
    raced = [candidate for candidate in tried if candidate.healed is not None]
    report.section("What was tried").text(
        f"{len(found.candidates)} shapes of the grid fit {budget}, {found.rejected} were too large. Those that no other one exceeds on "
        f"every axis were cut and tried as they are, those that lose least importance first: {len(tried)} of them. "
        + (f"The best {len(raced)} then learnt a little, and the better half of them went on for twice as long. " if raced else "")
        + "Of those as good as the best, the fastest was chosen; it stands first. Loss: the mean surprise at the next token of a "
        "document, in nats, right after the cut; lower is better. Agreement: how often its likeliest next token is the parent's. Tokens a "
        "second are an estimate, of all sequences together."
    )
    kinds = set(found.chosen.config.pattern)
    shown = {name: label for name, (label, kind) in COLUMNS.items() if kind is None or kind in kinds}
    rows = [
        [*(getattr(c.config, name) for name in shown), c.parameters, amount(c.bytes["total"]), f"{c.tokens_per_second:,.0f}", c.loss]
        + ["" if c.agreement is None else f"{c.agreement:.1%}"]
        + ([] if not raced else ["" if c.healed is None else c.healed])
        for c in tried[:ROWS]
    ]
    names = [*shown.values(), "parameters", "memory", "tok/s, estimated", "loss, nats", "agreement"]
    report.table([*names, *(["KL, learnt"] if raced else [])], rows)
    places = [(c.bytes["total"] / MIB, float(c.loss or 0.0)) for c in tried]
    report.figure(_points(places, "MiB", "loss, nats"), "Loss after the cut against memory. The line joins those that none beats in both.")
    slowness = [(1e3 / max(c.tokens_per_second, 1e-9), float(c.loss or 0.0)) for c in tried]
    report.figure(
        _points(slowness, "milliseconds a token, estimated", "loss, nats"),
        "Loss after the cut against time a token: the Pareto front of both.",
    )


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, lower being better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _points(places: list[tuple[float, float]], x: str, y: str) -> Figure:
    """Points, the front of those that none beats, and the first, which was chosen."""
    with plots.style():
        figure, axes = plots.canvas(x, y, "")
        axes.scatter([a for a, _ in places], [b for _, b in places], s=18, color=plots.COLOURS[0], label="tried")
        axes.plot(*zip(*pareto(places), strict=True), color=plots.COLOURS[0], linewidth=1, label="none beats these")
        axes.scatter([places[0][0]], [places[0][1]], s=60, color=plots.COLOURS[1], marker="D", label="chosen", zorder=3)
        axes.legend(loc="best", fontsize=9)
    return figure
