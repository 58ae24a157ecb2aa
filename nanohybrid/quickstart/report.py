"""The quickstart as one page of pictures, for someone who has not read the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanohybrid.quickstart.recipes import Recipes
from nanohybrid.quickstart.summary import Places, lineage, read_json, series
from nanohybrid.stages import Report, plots

MIB = 2**20
SHOWN = ("parent", "pruned", "distilled", "transformer")
SMOOTH = 5  # logged rows of which a loss curve shows the mean


def write_report(places: Places, recipes: Recipes, summary: dict[str, Any]) -> Path:
    """Write `report.html` beside the stages' own reports."""
    evaluation = read_json(places.evaluation / "summary.json")
    report = Report("nanohybrid quickstart: from raw text to a compressed, thinking model")
    _headline(report, summary)
    _data(report, places)
    _pretraining(report, places, summary)
    _alignment(report, places, summary)
    _compression(report, places, summary, evaluation)
    _thinking(report, recipes, evaluation)
    _context(report, recipes, evaluation)
    _own_words(report, evaluation)
    _next(report, places, summary)
    return report.write(places.out / "report.html")


def _headline(report: Report, summary: dict[str, Any]) -> None:
    accuracy = summary["accuracy"]
    recovery = summary["distillation_recovery"]
    hybrid, dense = (summary["decode_ms"][name] for name in ("hybrid", "transformer"))
    growth = f"hybrid {_growth(hybrid)}, Transformer {_growth(dense)}"
    report.text(
        f"Everything on this page was made in {summary['seconds'] / 60:.1f} minutes from what this Python install brought: "
        f"{summary['tokens_trained'] / 1e6:.1f} million training tokens, at most {summary['peak_memory_gib']:.1f} GiB of memory. "
        "It is the chain of the Nemotron Nano 2 report at a scale of about one part in ten thousand."
    )
    report.table(
        ["what", "found"],
        [
            ["right with thinking, and without", f"{accuracy['parent']['thinking']:.0%}, {accuracy['parent']['no_thinking']:.0%}"],
            [
                "after pruning, after distilling",
                f"{accuracy['pruned']['thinking']:.0%}, {accuracy['distilled']['thinking']:.0%}"
                + (f" ({recovery:.0%} of the loss regained)" if recovery is not None else ""),
            ],
            ["parameters of the parent and of the result", f"{summary['parameters']['parent']:,}, {summary['parameters']['distilled']:,}"],
            [f"a decode step at {hybrid[-1][0]:,} tokens of context, against {hybrid[0][0]}", growth],
            ["loss in FP8 against bf16", f"{summary['fp8_loss_gap']:+.2%}"],
        ],
    )  # fmt: skip


def _growth(points: list[list[float]]) -> str:
    return f"{points[-1][1] / points[0][1]:.1f} times as long"


def _data(report: Report, places: Places) -> None:
    measures = lineage(places.data)["measures"]
    report.section("1. Data").text(
        "Text and code come from Python's own documentation and library; problems are generated, and a solver of ours writes each "
        "solution as a chain of small equations, one a line. Filters drop what reads badly, duplicates, and whatever would give "
        "away a test problem."
    )
    rows = [
        (name, store["documents"], store["tokens"], sum(store["dropped"].values()))
        for name, store in measures["stores"].items()
    ]
    report.table(["store", "documents", "tokens", "dropped"], rows)


def _pretraining(report: Report, places: Places, summary: dict[str, Any]) -> None:
    report.section("2. Pretraining").text(
        "A hybrid in the 12B's proportions (mostly Mamba-2 and MLP layers, one attention layer) and a Transformer of its size read the "
        "same tokens, with a learning rate that warms up, stays, and decays. Two short runs compare bf16 with the FP8 recipe: E4M3 in "
        "tiles of 1x128 and blocks of 128x128, emulated here with the same rounding, and ended in bf16."
    )
    names = {"hybrid": places.base, "Transformer": places.dense_base}
    report.figure(
        plots.lines({k: _curve(v, "pretrain") for k, v in names.items()}, "tokens", "loss"),
        "Loss of the two, smoothed.",
    )
    twins = {"bf16": places.twin_bf16, "FP8": places.twin_fp8}
    report.figure(
        plots.lines({k: _curve(v, "pretrain") for k, v in twins.items()}, "tokens", "loss"),
        f"The short pair. Held-out loss in FP8 is {summary['fp8_loss_gap']:+.2%} from bf16's.",
    )


def _curve(stage: Path, name: str) -> list[tuple[float, float]]:
    return _smoothed([(row["tokens"], row["loss"]) for row in series(stage, name)])


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value replaced by the mean of the last few."""
    windows = [points[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(points))]
    return [(window[-1][0], sum(value for _, value in window) / len(window)) for window in windows]


def _alignment(report: Report, places: Places, summary: dict[str, Any]) -> None:
    before, after = summary["grpo"]["accuracy_before"], summary["grpo"]["accuracy_after"]
    report.section("3. Alignment").text(
        "Chats with worked traces, some answered at once, some with traces that were cut short, so that the model can answer whenever "
        "its thoughts are stopped. Then GRPO: it answers each problem several times, and what was right is made likelier. On held-out "
        f"problems of the kind it practiced, sampled answers went from {before:.0%} to {after:.0%} right."
    )
    curves = {"hybrid": _curve(places.sft, "sft"), "Transformer": _curve(places.transformer, "sft")}
    report.figure(plots.lines(curves, "tokens", "loss on the answers"), "Fine-tuning on chats.")
    rewards = _smoothed([(row["step"], row["accuracy"]) for row in series(places.parent, "rollouts")])
    report.figure(
        plots.lines({"sampled": rewards}, "step", "right answers"),
        "Right answers among the samples of a GRPO step, mean of five steps.",
    )


def _compression(report: Report, places: Places, summary: dict[str, Any], evaluation: dict[str, Any]) -> None:
    parent, small = (summary["parameters"][name] for name in ("parent", "distilled"))
    measures = lineage(places.distilled / "distilled")["measures"]
    report.section("4. Compression").text(
        f"Every layer, neuron, channel and head is scored on a few documents; shapes that fit the memory budget are tried; the best is "
        f"cut out of the parent ({small / parent:.0%} of its parameters are left) and learns from it again. Divergence from the parent: "
        f"{measures['kl_before']:.3f} nats a token after the cut, {measures['kl_after']:.4f} after learning. Scores, shapes and "
        "pictures of each step: `4-compress/report.html`."
    )
    models = [name for name in SHOWN if name in evaluation["models"]]
    modes = {"thinking": "thinking", "no thinking": "no_thinking"}
    found = evaluation["models"]
    heights = {label: [found[name][mode]["accuracy"] for name in models] for label, mode in modes.items()}
    errors = {
        label: [
            (found[n][m]["accuracy"] - found[n][m]["low"], found[n][m]["high"] - found[n][m]["accuracy"])
            for n in models
        ]
        for label, m in modes.items()
    }
    report.figure(
        plots.bars(models, heights, "accuracy", errors=errors),
        "Held-out problems solved, with 95 % intervals.",
    )
    report.text(
        "The Transformer has had the same pretraining and the same chats, but no GRPO; at this size it is about as accurate as the "
        f"hybrid before its own GRPO (`sft`: {summary['accuracy']['sft']['thinking']:.0%} thinking). What sets them apart comes last."
    )


def _thinking(report: Report, recipes: Recipes, evaluation: dict[str, Any]) -> None:
    report.section("5. Thinking, and how long").text(
        "When a budget of thinking tokens is used up the trace ends at its next line, and the model answers with what it has."
    )
    curve = evaluation["models"]["parent"]["curve"]
    points = {"parent": [(p["budget"], p["accuracy"], p["low"], p["high"]) for p in curve]}
    report.figure(plots.intervals(points, "thinking budget, tokens", "accuracy"), "Accuracy against budget.")
    report.table(
        ["budget", "right", "well formed", "thinking tokens", "answer tokens"],
        [
            [p["budget"], p["accuracy"], p["well_formed"], p["thinking_tokens"], p["answer_tokens"]]
            for p in curve
        ],
    )
    families = list(evaluation["models"]["parent"]["thinking"]["families"])
    bars = {
        label: [evaluation["models"]["parent"][mode]["families"][family]["accuracy"] for family in families]
        for label, mode in {"thinking": "thinking", "no thinking": "no_thinking"}.items()
    }
    report.figure(
        plots.bars(families, bars, "accuracy"), f"By family; {recipes.evaluate.problems} problems each."
    )


def _context(report: Report, recipes: Recipes, evaluation: dict[str, Any]) -> None:
    decode = {
        name: evaluation["decode"][key]
        for name, key in {"hybrid": "parent", "Transformer": "transformer"}.items()
    }
    report.section("6. What a long context costs").text(
        f"One decode step of {recipes.evaluate.decode_batch} sequences. A Mamba layer keeps a state of fixed size, an attention layer "
        "keeps every token; the hybrid has one attention layer, so that its time grows too, only more slowly."
    )
    times = {name: [(row["context"], row["milliseconds"]) for row in rows] for name, rows in decode.items()}
    report.figure(plots.lines(times, "context, tokens", "milliseconds a step", log_x=True), "Time of a step.")
    kept = {
        name: [(row["context"], row["sequence_bytes"] / MIB) for row in rows] for name, rows in decode.items()
    }
    report.figure(
        plots.lines(kept, "context, tokens", "MiB a sequence", log_x=True, log_y=True),
        "Memory of one sequence.",
    )


def _own_words(report: Report, evaluation: dict[str, Any]) -> None:
    report.section("In its own words").text(
        "One held-out problem of each family, as the distilled model answers it."
    )
    for example in evaluation["models"]["distilled"]["thinking"]["examples"]:
        report.text(f"`{example['prompt']}`: {'right' if example['correct'] else 'wrong'}").code(
            example["text"]
        )


def _next(report: Report, places: Places, summary: dict[str, Any]) -> None:
    report.section("Go on").text(
        "Chat with the result, or look closer at any stage: each directory has its own `report.html`."
    )
    report.code(chat_command(places))
    rows = [(f"`{name}`", seconds) for name, seconds in summary["stage_seconds"].items()]
    report.table(["stage", "seconds"], rows)


def chat_command(places: Places) -> str:
    """How to talk to the result."""
    return f"nanohybrid chat {places.distilled}"
