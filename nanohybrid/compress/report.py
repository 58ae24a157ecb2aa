"""A compression as a page: what there was room for, what mattered, what was tried, what was kept, and how well it healed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanohybrid.compress.report_stages import through_the_stages
from nanohybrid.compress.search import Candidate, Search
from nanohybrid.config import HybridConfig
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import QUANTIZED, Budget
from nanohybrid.estimate.units import amount
from nanohybrid.model.mixers import MIXERS
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.prunable import known_axes, layers_with, prunable_axes, unit_of
from nanohybrid.prune.target import Target
from nanohybrid.stages import Report, plots
from nanohybrid.stages.report import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB, MIB = 2**30, 2**20
ROWS = 12  # candidates in the table
POINTS = 200  # points of a curve of sorted scores
CURVES = 5  # of layers of a kind, in one figure


def compression_report(
    budget: Budget,
    parent: HybridConfig,
    scores: Importance,
    found: Search,
    record: Mapping[str, Any],
    directory: Path,
) -> Report:
    """The report of the stage whose directory this is; `record` is its lineage."""
    measures = record["measures"]
    report = Report("nanohybrid compress")
    _summary(report, budget, parent, found.chosen, measures, machine(record["made_with"]))
    _removed(report, parent, scores, found.chosen)
    _importance(report, parent, scores)
    _candidates(report, budget, found)
    through_the_stages(report, directory, found.chosen.config, measures)
    return report


def _summary(
    report: Report,
    budget: Budget,
    parent: HybridConfig,
    chosen: Candidate,
    measures: Mapping[str, Any],
    here: str,
) -> None:
    before, after = budget.plain.memory(parent).as_dict(), budget.memory(chosen.config).as_dict()
    count, agreement, work = Footprint.of(parent).parameters, measures["agreement"], measures["at_work"]
    last = list(agreement)[-1]
    stages = ", ".join(stage["kind"] for stage in measures.get("after", ()))
    then = f" Short stages of alignment followed: {stages}." if stages else ""
    then += f" Last its matrices became {budget.dtype}." if budget.dtype in QUANTIZED else ""
    room = f"{amount(budget.bytes)} while it works on {_sequences(budget)} of {budget.context:,} tokens, its weights in {budget.dtype}"
    speeds = [work[name].get("tokens_per_second", "no room here to run it") for name in ("parent", "result")]
    if chosen.config == parent:
        what = f"A model was to fit {room}. It fits whole, so nothing was cut, and nothing had to be learned again.{then}"
        alike = f"the result's likeliest next token is the parent's {agreement[last]:.1%} of the time."
    else:
        what = (
            f"A model, the parent, was made smaller, so that it fits {room}. Its least important parts were cut out, and what was left "
            f"learned from the parent again.{then}"
        )
        alike = (
            f"the result's likeliest next token is the parent's {agreement[last]:.1%} of the time; right after the cut it was "
            f"{agreement['pruned']:.1%}."
        )
    report.text(
        f"{what} So at work the parent takes {amount(before['total'])}, the result {amount(after['total'])}, with "
        f"{chosen.parameters:,} of {count:,} parameters ({chosen.parameters / count:.0%}). On the documents it was measured on, {alike}"
    )
    report.figure(
        plots.strip({"parent": parent.pattern, "result": chosen.config.pattern}),
        "The layers of both, first to last.",
    )
    parts = {
        "weights": "weights",
        "kv": "keys and values",
        "state": "states",
        "reserve": "a step",
        "total": "total",
    }
    shown = [part for part in parts if before[part]]
    unit, name = (GIB, "GiB") if before["total"] >= GIB else (MIB, "MiB")
    series = {
        who: [table[part] / unit for part in shown] for who, table in (("parent", before), ("result", after))
    }
    figure = plots.bars([parts[part] for part in shown], series, f"memory, {name}")
    _budget_line(figure, budget.bytes / unit, len(shown))
    step = (
        f' "A step" is the reserve of the budget: what the engine computes with while it takes in {budget.step:,} tokens of a prompt, '
        "a bound from the widths of the layers."
        if budget.step
        else " The budget was a share of these, so it has no reserve for the activations of a step."
    )
    report.figure(figure, f"Memory by what it holds; the line is the budget.{step}")
    rows = [["tokens a second, measured", *speeds]]
    for label, key in (
        ("memory of the weights", "weight_bytes"),
        ("memory of keys, values and states", "state_bytes"),
    ):
        rows.append([label, *(amount(int(work[name][key])) for name in ("parent", "result"))])
    report.table(["at work", "parent", "result"], rows)
    beside = ", the parent in bf16" if budget.dtype in QUANTIZED else ""
    report.text(
        f"Speed: one decode step, which adds a token to {_sequences(budget)} of {int(work['parent']['context']):,} tokens, in "
        f"{budget.dtype}{beside}; both models in turns, the quickest of a few, on {here}. A busy machine blurs it. Memory: as allocated "
        f"for {budget.context:,} tokens."
    )


def _budget_line(figure: Figure, height: float, groups: int) -> None:
    """The budget over all groups of bars, named at its end; not over the last bar, whose number stands just where the budget does."""
    axes, color, last = figure.axes[0], plots.COLORS[2], groups - 1
    axes.hlines([height, height], [-0.5, last + 0.42], [last, last + 0.5], color=color, linewidth=1.2)
    axes.annotate(
        "budget",
        (last + 0.5, height),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=color,
    )


def _sequences(budget: Budget) -> str:
    return f"{budget.batch:,} sequence{'s' * (budget.batch > 1)}"


def _removed(report: Report, base: HybridConfig, scores: Importance, chosen: Candidate) -> None:
    """What went from each axis, and the share of its measured importance that went with it."""
    proxy, after = ImportanceLoss(base, scores), chosen.target
    report.section("What was removed, and why").text(
        "Everything that could go was scored (next section). The entries with the lowest scores went, as many as the budget asked. "
        "Importance lost: the share of the squared scores that went, of layers the share of their changes of the output."
    )
    rows = []
    for what, which, size, target in _removals(base, after):
        left = target.layers or next(iter(target.sizes.values()), 0)
        if left != size:
            rows.append([what, size, left, f"{1 - left / size:.0%}", f"{proxy.of(target):.1%}", which])
    if rows:
        report.table(["what", "parent", "result", "removed", "importance lost", "which went"], rows)
    else:
        report.text("Nothing: the parent itself fits.")
    by_part = Footprint.of(chosen.config).parameters_by_part
    report.table(
        ["parameters of", "parent", "result"],
        [[p, n, by_part.get(p, 0)] for p, n in Footprint.of(base).parameters_by_part.items()],
    )


def _removals(base: HybridConfig, after: Target) -> Iterator[tuple[str, str, int, Target]]:
    """What can be removed, which entries go, the size before, and the part of the target that says how many remain."""
    count = base.num_hidden_layers
    least = "those without which the output changes least"
    yield "layers", least, count, Target(layers=after.layers or count)
    for name, axis in prunable_axes(base.pattern).items():
        _, groups = unit_of(base, name)
        which = "those with the lowest scores"
        which += f", as many in each group ({groups})" if groups else ""
        which += ", the same in every layer" if axis.shared else ""
        yield axis.label, which, getattr(base, name), Target(sizes={name: after.size_of(name, base)})


def _importance(report: Report, base: HybridConfig, scores: Importance) -> None:
    facts = scores.facts
    times = ", times the norm of the weights that read it" if facts.get("outgoing") else ""
    report.section("What matters").text(
        f"A score says how strongly a part of the model fires: the mean size of its activation over a document, then the root of the "
        f"summed squares over documents{times}. Measured on {facts['samples']:,} documents of {facts['tokens']:,} tokens together (their "
        f"hash: `{facts['calibration']}`). A curve that falls steeply has much to spare.{_stability(facts)}"
    )
    axes = prunable_axes(base.pattern)
    shared = {axis.label: scores.of_shared(name) for name, axis in axes.items() if axis.shared}
    report.figure(
        _sorted(shared, [], "axes with one ranking for all layers"),
        "Scores from the highest to the lowest, as shares of the highest.",
    )
    for name, axis in axes.items():
        if axis.shared:
            continue
        table = {
            f"layer {layer}": scores.of_layer(layer, name, {}) for layer in layers_with(base.pattern, name)
        }
        curves, rest, some = _few(table)
        report.figure(
            _sorted(curves, rest, axis.label), f"The same for the {axis.label} of each layer.{some}"
        )
    by_cosine = facts.get("layers_by") == "cosine"
    if len(scores.layers) and not by_cosine:
        report.figure(
            plots.by_layer(base.pattern, scores.layers.tolist(), "mean squared change of the logits"),
            "How much the logits, the model's scores for the next token, change when one layer alone is skipped. The order in which "
            f"layers would go: {', '.join(map(str, scores.order))}.",
        )
    if len(scores.cosine):
        order = (
            f" The order in which they would go: {', '.join(map(str, scores.order))}." if by_cosine else ""
        )
        report.figure(
            plots.by_layer(base.pattern, scores.cosine.tolist(), "1 - cosine"),
            "How far each layer turns the hidden state, 0 where it leaves its direction alone: a second opinion, which costs one pass."
            f"{order}",
        )
    rows = [
        [
            index,
            MIXERS[kind].label,
            *(float(values[index]) if len(values) else "" for values in (scores.layers, scores.cosine)),
        ]
        for index, kind in enumerate(base.pattern)
    ]
    report.table(["layer", "kind", "change of the logits", "1 - cosine"], rows)


def _stability(facts: Mapping[str, Any]) -> str:
    """How far the rankings on the even and on the odd documents agree, as a sentence."""
    rows = facts.get("stability") or {}
    labels = {name: axis.label for name, axis in known_axes().items()}
    named = ", ".join(
        f"{labels.get(name, name.replace('_', ' '))} {value:.2f}" for name, value in rows.items()
    )
    what = "Are these orders the model's, or the documents'? Rank correlation of the scores on every other document with those on the rest"
    return f" {what} (1: the same order): {named}." if rows else ""


def _few(curves: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor], str]:
    """So many of the curves as can be told apart, from the steepest to the flattest; the rest; and a sentence where there is a rest."""
    if len(curves) <= CURVES:
        return curves, [], ""
    steep = sorted(curves, key=lambda name: float(curves[name].mean() / curves[name].max().clamp(min=1e-30)))
    shown = {steep[round(i * (len(steep) - 1) / (CURVES - 1))] for i in range(CURVES)}
    named = {name: values for name, values in curves.items() if name in shown}
    rest = [values for name, values in curves.items() if name not in shown]
    return (
        named,
        rest,
        f" {CURVES} of {len(curves)} layers have names, from the steepest curve to the flattest; the others are gray.",
    )


def _sorted(curves: dict[str, Tensor], rest: list[Tensor], title: str) -> Figure:
    """Scores of each name, falling, over the share of the axis; both run from 0 to 1. The rest behind them."""
    series = {name: _falling(values) for name, values in curves.items()}
    return plots.lines(
        series,
        "share of them, the strongest first",
        "score",
        title,
        rest=[_falling(values) for values in rest],
    )


def _falling(values: Tensor) -> list[tuple[float, float]]:
    """Points of the curve of sorted scores."""
    ordered = values.sort(descending=True).values
    last = max(len(ordered) - 1, 1)
    places = sorted({round(i * last / POINTS) for i in range(POINTS + 1)} & set(range(len(ordered))))
    return [(place / last, float(ordered[place] / ordered[0].clamp(min=1e-30))) for place in places]


def _candidates(report: Report, budget: Budget, found: Search) -> None:
    tried = [candidate for candidate in found.candidates if candidate.loss is not None]
    raced = [candidate for candidate in tried if candidate.healed is not None]
    rest = f", {ROWS - 1} others below" if len(tried) > ROWS else ""
    report.section("What was tried").text(
        f"Of all shapes that the recipe lists, {len(found.candidates):,} fit {budget}, and {found.rejected:,} were too large. A shape that "
        f"another one exceeds in everything was left out. Of the others the {len(tried)} that lose least importance were cut and tried. "
        + (
            f"The best {len(raced)} then learned a little, and the better half of them went on for twice as long. "
            if raced
            else ""
        )
        + f"Of those as good as the best, the fastest was chosen; it stands first{rest}. Loss: the mean surprise at the next token of a "
        "document, in nats (1 nat is 1.44 bits), right after the cut; lower is better. Agreement: how often its likeliest next token is "
        "the parent's. Tokens a second are an estimate, of all sequences together."
    )
    axes = prunable_axes(found.chosen.config.pattern)
    rows = [
        [
            c.config.num_hidden_layers,
            *(getattr(c.config, name) for name in axes),
            c.parameters,
            amount(c.bytes["total"]),
            f"{c.tokens_per_second:,.0f}",
            c.loss,
        ]
        + ["" if c.agreement is None else f"{c.agreement:.1%}"]
        + ([] if not raced else ["" if c.healed is None else c.healed])
        for c in tried[:ROWS]
    ]
    labels = [axis.label for axis in axes.values()]
    names = ["layers", *labels, "parameters", "memory", "tok/s, estimated", "loss, nats", "agreement"]
    report.table([*names, *(["KL, learned"] if raced else [])], rows)
    unit, name = (GIB, "GiB") if tried[0].bytes["total"] >= GIB else (MIB, "MiB")
    places = [(c.bytes["total"] / unit, float(c.loss or 0.0)) for c in tried]
    figure = _points(places, f"memory, {name}", "loss, nats")
    front = "The line joins those that none beats in both."
    report.figure(
        figure, f"Loss right after the cut against memory: lower, and further to the left, is better. {front}"
    )
    slowness = [(1e3 / max(c.tokens_per_second, 1e-9), float(c.loss or 0.0)) for c in tried]
    report.figure(
        _points(slowness, "milliseconds a token, estimated", "loss, nats"),
        "The same against the time of a token.",
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
        axes.scatter(
            [a for a, _ in places], [b for _, b in places], s=18, color=plots.COLORS[0], label="tried"
        )
        axes.plot(
            *zip(*pareto(places), strict=True), color=plots.COLORS[0], linewidth=1, label="none beats these"
        )
        axes.scatter(
            [places[0][0]], [places[0][1]], s=60, color=plots.COLORS[1], marker="D", label="chosen", zorder=3
        )
        plots.legend(figure, 3)
    return figure
