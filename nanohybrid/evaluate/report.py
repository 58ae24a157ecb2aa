"""The report of an evaluation: accuracy, accuracy vs. thinking budget, decode time and memory vs. context,
losses, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanohybrid.evaluate.recipe import EvaluateRecipe
from nanohybrid.stages import Report, plots

MIB = 2**20


def evaluation_report(recipe: EvaluateRecipe, summary: Mapping[str, Any]) -> Report:
    """The report of an evaluation; `summary` holds the contents of summary.json."""
    report = Report("nanohybrid evaluate")
    models: Mapping[str, Any] = summary["models"]
    _accuracy(report, recipe, models)
    _curves(report, models)
    _decode(report, recipe, summary["decode"])
    _losses(report, models)
    _examples(report, models)
    return report


def _accuracy(report: Report, recipe: EvaluateRecipe, models: Mapping[str, Any]) -> None:
    first = next(iter(models.values()))
    how = "greedy" if recipe.temperature == 0 else f"sampled at temperature {recipe.temperature}"
    report.section("Accuracy").text(
        f"{first['thinking']['problems']} held-out problems of the families {', '.join(recipe.tasks)}; "
        f"{how}, at most "
        f"{recipe.max_tokens} tokens. Intervals are Wilson's 95 % intervals. **Well formed**: the model "
        "stopped by itself, and its "
        "trace has exactly one `</think>` (none with thinking off)."
    )
    rows = [
        [name, "on" if mode == "thinking" else "off", found[mode]["accuracy"], _interval(found[mode]),
         found[mode]["well_formed"],
         found[mode]["thinking_tokens"], found[mode]["answer_tokens"]]
        for name, found in models.items() for mode in ("thinking", "no_thinking")
    ]  # fmt: skip
    report.table(
        ["model", "thinking", "accuracy", "95 % interval", "well formed", "thinking tokens", "answer tokens"],
        rows,
    )
    modes = {"thinking": "thinking", "no thinking": "no_thinking"}
    heights = {label: [found[mode]["accuracy"] for found in models.values()] for label, mode in modes.items()}
    errors = {
        label: [
            (found[mode]["accuracy"] - found[mode]["low"], found[mode]["high"] - found[mode]["accuracy"])
            for found in models.values()
        ]
        for label, mode in modes.items()
    }
    report.figure(
        plots.bars(list(models), heights, "accuracy", errors=errors),
        "Accuracy of each model on held-out problems, with thinking on and off.",
    )
    families = list(first["thinking"]["families"])
    bars = {
        name: [found["thinking"]["families"][family]["accuracy"] for family in families]
        for name, found in models.items()
    }
    report.figure(plots.bars(families, bars, "accuracy"), "Accuracy by family, with thinking.")


def _curves(report: Report, models: Mapping[str, Any]) -> None:
    curves = {name: found["curve"] for name, found in models.items() if "curve" in found}
    if not curves:
        return
    report.section("Accuracy vs. thinking budget").text(
        "When the budget is used up, the trace ends at its next newline, and the model answers. The answers "
        "of a model that was trained "
        "on truncated traces stay well formed and do not get longer at small budgets."
    )
    points = {
        name: [(p["budget"], p["accuracy"], p["low"], p["high"]) for p in curve]
        for name, curve in curves.items()
    }
    report.figure(
        plots.intervals(points, "thinking budget, tokens", "accuracy"),
        "Accuracy vs. thinking budget, with 95 % intervals.",
    )
    report.table(
        [
            "model",
            "thinking budget",
            "accuracy",
            "95 % interval",
            "well formed",
            "thinking tokens",
            "answer tokens",
        ],
        [
            [
                name,
                p["budget"],
                p["accuracy"],
                _interval(p),
                p["well_formed"],
                p["thinking_tokens"],
                p["answer_tokens"],
            ]
            for name, curve in curves.items()
            for p in curve
        ],
    )


def _decode(report: Report, recipe: EvaluateRecipe, decode: Mapping[str, Any]) -> None:
    if not decode:
        return
    report.section("Decode time vs. context length").text(
        f"Time of one decode step at batch size {recipe.decode_batch}: the median of {recipe.decode_rounds} "
        "steps after warmup, models in "
        "turns. KV cache and recurrent states are filled with random numbers and not by a prefill; this does "
        "not change the time."
    )
    milliseconds = {
        name: [(row["context"], row["milliseconds"]) for row in rows] for name, rows in decode.items()
    }
    report.figure(
        plots.lines(milliseconds, "context length, tokens", "ms per decode step", log_x=True),
        "Time of a decode step vs. context length.",
    )
    cache_mib = {
        name: [(row["context"], row["sequence_bytes"] / MIB) for row in rows] for name, rows in decode.items()
    }
    report.figure(
        plots.lines(cache_mib, "context length, tokens", "MiB per sequence", log_x=True, log_y=True),
        "Cache memory of one sequence: KV cache of the attention layers and recurrent states of the Mamba "
        "layers.",
    )
    rows = [
        [name, r["context"], r["milliseconds"], r["quickest"], r["sequence_bytes"]]
        for name, found in decode.items()
        for r in found
    ]
    report.table(
        ["model", "context length", "ms per step, median", "ms per step, minimum", "bytes per sequence"], rows
    )


def _losses(report: Report, models: Mapping[str, Any]) -> None:
    rows = [
        [name, key.removeprefix("loss."), value["loss"], value["perplexity"], value["targets"]]
        for name, found in models.items()
        for key, value in found.items()
        if key.startswith("loss.")
    ]
    if rows:
        report.section("Loss on held-out documents").table(
            ["model", "token store", "loss, nats", "perplexity", "target tokens"], rows
        )


def _examples(report: Report, models: Mapping[str, Any]) -> None:
    report.section("Example answers")
    for name, found in models.items():
        for example in found["thinking"]["examples"]:
            verdict = "correct" if example["correct"] else "wrong"
            report.text(f"**{name}**, `{example['prompt']}`: {verdict}").code(example["text"])


def _interval(score: Mapping[str, Any]) -> str:
    return f"{score['low']:.3f} to {score['high']:.3f}"
