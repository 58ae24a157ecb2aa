"""The report of a compression: the budget, the importance scores, the candidates, the selected shape, and the
later steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanohybrid.compress.report_stages import POST_TRAINING, report_stages
from nanohybrid.compress.search import Candidate, Search
from nanohybrid.config import HybridConfig
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import QUANTIZED, Budget
from nanohybrid.estimate.units import GIB, MIB, amount
from nanohybrid.model.mixers import MIXERS
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.prunable import known_axes, layers_with, prunable_axes, unit_of
from nanohybrid.prune.target import Target
from nanohybrid.stages import Report, plots
from nanohybrid.stages.report import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 12
"""Candidates in the table."""
POINTS = 200
"""Points of a curve of sorted scores."""
CURVES = 5
"""Layers with a name in one figure."""
PARTS = {"weights": "weights", "kv": "KV cache", "state": "states", "reserve": "a step", "total": "total"}
"""Name of an item of Memory -> its label."""


def compression_report(
    budget: Budget,
    base: HybridConfig,
    scores: Importance,
    found: Search,
    record: Mapping[str, Any],
    directory: Path,
) -> Report:
    """The report of the stage in `directory`. base: the base model's configuration. record: the stage's
    lineage."""
    measures = record["measures"]
    report = Report("nanohybrid compress")
    _summary(report, budget, base, found.selected, measures)
    _memory(report, budget, base, found.selected)
    _inference(report, budget, measures["inference"], machine(record["made_with"]))
    _removed(report, base, scores, found.selected)
    _importance(report, base, scores)
    _candidates(report, budget, found)
    report_stages(report, directory, found.selected.config, measures)
    return report


def _summary(
    report: Report, budget: Budget, base: HybridConfig, selected: Candidate, measures: Mapping[str, Any]
) -> None:
    before, after = budget.plain.memory(base).total, budget.memory(selected.config).total
    count, agreement = Footprint.of(base).parameters, measures["agreement"]
    last = agreement[list(agreement)[-1]]
    stages = ", ".join(stage["kind"] for stage in measures.get(POST_TRAINING, ()))
    then = f" Post-training followed: {stages}." if stages else ""
    then += f" At the end its matrices became {budget.dtype}." if budget.dtype in QUANTIZED else ""
    limit = f"{amount(budget.bytes)} for {_sequences(budget)} of {budget.context:,} tokens in {budget.dtype}"
    same = f"the result's most probable next token is the base model's at {last:.1%} of the tokens"
    if selected.config == base:
        what = f"The budget is {limit}. The base model fits, so nothing was pruned or distilled.{then}"
        same += "."
    else:
        what = (
            f"A base model was made smaller to fit {limit}. Its least important parts were removed, "
            "and the rest was distilled "
            f"from the base model.{then}"
        )
        same += f"; right after pruning it was at {agreement['pruned']:.1%}."
    report.text(
        f"{what} At inference the base model takes {amount(before)}, the result {amount(after)}, "
        f"with {selected.parameters:,} of "
        f"{count:,} parameters ({selected.parameters / count:.0%}). On the calibration documents, {same}"
    )
    report.figure(
        plots.strip({"base model": base.pattern, "result": selected.config.pattern}),
        "The layers of both, first to last.",
    )


def _memory(report: Report, budget: Budget, base: HybridConfig, selected: Candidate) -> None:
    """A figure of the memory of both models, by what it holds."""
    before, after = budget.plain.memory(base).as_dict(), budget.memory(selected.config).as_dict()
    shown = [part for part in PARTS if before[part]]
    unit, name = (GIB, "GiB") if before["total"] >= GIB else (MIB, "MiB")
    series = {
        who: [table[part] / unit for part in shown]
        for who, table in (("base model", before), ("result", after))
    }
    figure = plots.bars([PARTS[part] for part in shown], series, f"memory, {name}")
    _budget_line(figure, budget.bytes / unit, len(shown))
    step = (
        f' "A step" is reserved for the activations of a prefill step of {budget.step:,} tokens: '
        "an upper bound from the widths "
        "of the layers."
        if budget.step
        else " The budget was a share of these, so nothing is reserved for the activations of a step."
    )
    report.figure(figure, f"Memory by what it holds; the line is the budget.{step}")


def _inference(report: Report, budget: Budget, measured: Mapping[str, Mapping[str, Any]], here: str) -> None:
    """A table of the speed and memory of both models as measured on this machine."""
    models = ("parent", "result")
    speeds = [measured[name].get("tokens_per_second", "does not fit here") for name in models]
    rows = [["tokens a second, measured", *speeds]]
    for label, key in (("memory of the weights", "weight_bytes"), ("KV cache and states", "state_bytes")):
        rows.append([label, *(amount(int(measured[name][key])) for name in models)])
    report.table(["at inference", "base model", "result"], rows)
    note = ", the base model in bf16" if budget.dtype in QUANTIZED else ""
    report.text(
        f"Speed: one decode step, which adds a token to {_sequences(budget)} of "
        f"{int(measured['parent']['context']):,} tokens, in "
        f"{budget.dtype}{note}; the models take turns, the quickest of a few steps counts, on "
        f"{here}. Other processes slow it "
        f"down. Memory: as allocated for {budget.context:,} tokens."
    )


def _budget_line(figure: Figure, height: float, groups: int) -> None:
    """Draw the budget over all groups of bars, with its name at the end; not over the last bar, whose number
    is at that height."""
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


def _removed(report: Report, base: HybridConfig, scores: Importance, selected: Candidate) -> None:
    """What went from each axis, and the share of its measured importance that went with it."""
    proxy, after = ImportanceLoss(base, scores), selected.target
    report.section("What was removed, and why").text(
        "Everything that could go was scored (next section). The entries with the lowest scores "
        "went, as many as the budget asked. "
        "Importance lost: the share of the squared scores that went, of layers the share of their "
        "changes of the output."
    )
    rows = []
    for what, which, size, target in _removals(base, after):
        left = target.layers or next(iter(target.sizes.values()), 0)
        if left != size:
            rows.append([what, size, left, f"{1 - left / size:.0%}", f"{proxy.of(target):.1%}", which])
    if rows:
        report.table(["what", "base model", "result", "removed", "importance lost", "which went"], rows)
    else:
        report.text("Nothing: the base model fits.")
    by_part = Footprint.of(selected.config).parameters_by_part
    report.table(
        ["parameters of", "base model", "result"],
        [[p, n, by_part.get(p, 0)] for p, n in Footprint.of(base).parameters_by_part.items()],
    )


def _removals(base: HybridConfig, after: Target) -> Iterator[tuple[str, str, int, Target]]:
    """What can be removed, which entries go, the size before, and the part of the target that says how many
    remain."""
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
    times = ", times the norm of the weights that read it" if facts.get("scale_by_outgoing_norm") else ""
    report.section("Importance").text(
        "A score says how strongly an entry activates: the mean size of its activation over a "
        "document, then the L2 norm over "
        f"documents{times}. Measured on {facts['samples']:,} documents of {facts['tokens']:,} tokens "
        "together (their hash: "
        f"`{facts['calibration']}`). Where a curve falls steeply, much can be removed.{_stability(facts)}"
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
    by_cosine = facts.get("depth_importance") == "cosine"
    if len(scores.layers) and not by_cosine:
        report.figure(
            plots.by_layer(base.pattern, scores.layers.tolist(), "mean squared change of the logits"),
            "The change of the logits, the scores of the next token, when one layer alone is "
            "skipped. The order in which layers "
            f"would go: {', '.join(map(str, scores.order))}.",
        )
    if len(scores.cosine):
        order = (
            f" The order in which they would go: {', '.join(map(str, scores.order))}." if by_cosine else ""
        )
        report.figure(
            plots.by_layer(base.pattern, scores.cosine.tolist(), "1 - cosine"),
            "How far each layer changes the direction of the hidden state; 0 where it does not. "
            f"This needs one pass.{order}",
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
    """A sentence on how far the rankings on the even and on the odd documents agree; empty where that was not
    measured."""
    rows = facts.get("stability") or {}
    labels = {name: axis.label for name, axis in known_axes().items()}
    named = ", ".join(
        f"{labels.get(name, name.replace('_', ' '))} {value:.2f}" for name, value in rows.items()
    )
    what = "Rank correlation of the scores on every other document with those on the rest (1: the same order)"
    return f" {what}: {named}." if rows else ""


def _few(curves: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor], str]:
    """At most CURVES curves, from the steepest to the flattest; the rest; and a sentence where there is a
    rest."""
    if len(curves) <= CURVES:
        return curves, [], ""
    steep = sorted(curves, key=lambda name: float(curves[name].mean() / curves[name].max().clamp(min=1e-30)))
    shown = {steep[round(i * (len(steep) - 1) / (CURVES - 1))] for i in range(CURVES)}
    named = {name: values for name, values in curves.items() if name in shown}
    rest = [values for name, values in curves.items() if name not in shown]
    return (
        named,
        rest,
        f" {CURVES} of {len(curves)} layers are named, from the steepest curve to the flattest; the "
        "others are gray.",
    )


def _sorted(curves: dict[str, Tensor], rest: list[Tensor], title: str) -> Figure:
    """Sorted scores over the share of the axis, both from 0 to 1; `rest` in gray behind them."""
    series = {name: _falling(values) for name, values in curves.items()}
    return plots.lines(
        series,
        "share of them, the highest first",
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
    """A table of the candidates that were evaluated, and their losses against memory and speed."""
    evaluated = [candidate for candidate in found.candidates if candidate.loss is not None]
    distilled = [candidate for candidate in evaluated if candidate.distilled_kl is not None]
    rest = f", {ROWS - 1} others below" if len(evaluated) > ROWS else ""
    halving = (
        f"The best {len(distilled)} were then distilled a little, and the better half of them "
        "continued for twice as long. "
        if distilled
        else ""
    )
    report.section("Candidates").text(
        f"Of all shapes of the grid, {len(found.candidates):,} fit {budget}, and {found.rejected:,} "
        "were too large. A shape was left "
        f"out where another one is at least as large on every axis. The {len(evaluated)} others that "
        "lose least importance were "
        f"pruned and evaluated. {halving}Of those as good as the best, the fastest was selected; it "
        f"is in the first row{rest}. Loss: "
        "the cross-entropy of the next token of a document, in nats (1 nat is 1.44 bits), right "
        "after pruning; lower is better. "
        "Agreement: how often the most probable next token is the base model's. Tokens a second are "
        "an estimate, of all sequences "
        "together."
    )
    axes = prunable_axes(found.selected.config.pattern)
    labels = [axis.label for axis in axes.values()]
    names = ["layers", *labels, "parameters", "memory", "tok/s, estimated", "loss, nats", "agreement"]
    rows = [_row(candidate, list(axes), bool(distilled)) for candidate in evaluated[:ROWS]]
    report.table([*names, *(["KL, distilled"] if distilled else [])], rows)
    unit, name = (GIB, "GiB") if evaluated[0].bytes["total"] >= GIB else (MIB, "MiB")
    places = [(c.bytes["total"] / unit, float(c.loss or 0.0)) for c in evaluated]
    report.figure(
        _points(places, f"memory, {name}", "loss, nats"),
        "Loss right after pruning against memory; lower and further to the left is better. The line "
        "joins the Pareto front.",
    )
    slowness = [(1e3 / max(c.tokens_per_second, 1e-9), float(c.loss or 0.0)) for c in evaluated]
    report.figure(
        _points(slowness, "milliseconds a token, estimated", "loss, nats"),
        "The same against the time of a token.",
    )


def _row(candidate: Candidate, axes: list[str], distilled: bool) -> list[Any]:
    """A candidate's row of the table."""
    config, agreement = candidate.config, candidate.agreement
    row = [config.num_hidden_layers, *(getattr(config, axis, "") for axis in axes), candidate.parameters]
    row += [amount(candidate.bytes["total"]), f"{candidate.tokens_per_second:,.0f}", candidate.loss]
    row += ["" if agreement is None else f"{agreement:.1%}"]
    return row + (["" if candidate.distilled_kl is None else candidate.distilled_kl] if distilled else [])


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front: the points that no other point beats in both coordinates; lower is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _points(places: list[tuple[float, float]], x: str, y: str) -> Figure:
    """All points, their Pareto front, and the first, which was selected."""
    with plots.style():
        figure, axes = plots.canvas(x, y, "")
        axes.scatter(
            [a for a, _ in places], [b for _, b in places], s=18, color=plots.COLORS[0], label="evaluated"
        )
        axes.plot(
            *zip(*pareto(places), strict=True), color=plots.COLORS[0], linewidth=1, label="Pareto front"
        )
        axes.scatter(
            [places[0][0]],
            [places[0][1]],
            s=60,
            color=plots.COLORS[1],
            marker="D",
            label="selected",
            zorder=3,
        )
        plots.legend(figure, 3)
    return figure
