"""The report of the quickstart, for readers who do not know the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanohybrid.quickstart.recipes import Recipes
from nanohybrid.quickstart.summary import RunPaths, lineage, read_json, series
from nanohybrid.stages import Report, plots

MIB = 2**20
SHOWN = {"parent": "aligned", "pruned": "pruned", "distilled": "distilled", "transformer": "Transformer"}
SMOOTH = 5  # window of the moving average of loss curves, in logged rows


def write_report(paths: RunPaths, recipes: Recipes, summary: dict[str, Any]) -> Path:
    """Write `report.html`; each stage has its own report too."""
    evaluation = read_json(paths.evaluation / "summary.json")
    report = Report("nanohybrid quickstart: from raw text to a compressed, thinking model")
    _results(report, summary)
    _data(report, paths)
    _pretraining(report, paths, summary)
    _alignment(report, paths, summary)
    _compression(report, paths, summary, evaluation)
    _thinking(report, recipes, evaluation)
    _context(report, recipes, evaluation)
    _examples(report, evaluation)
    _next(report, paths, summary)
    return report.write(paths.out / "report.html")


def _results(report: Report, summary: dict[str, Any]) -> None:
    accuracy = summary["accuracy"]
    recovery = summary["distillation_recovery"]
    hybrid, dense = (summary["decode_ms"][name] for name in ("hybrid", "transformer"))
    growth = f"hybrid {_growth(hybrid)}, Transformer {_growth(dense)}"
    report.text(
        f"This run took {summary['seconds'] / 60:.1f} minutes, {summary['tokens_trained'] / 1e6:.1f} million "
        "training tokens and at most "
        f"{summary['peak_memory_gib']:.1f} GiB of memory. All data comes from the Python installation. The "
        "pipeline is that of the "
        "Nemotron Nano 2 report, at about 1/10,000 of its scale."
    )
    report.table(
        ["result", "value"],
        [
            [
                "accuracy of the aligned model with thinking, without",
                f"{accuracy['parent']['thinking']:.0%}, {accuracy['parent']['no_thinking']:.0%}",
            ],
            [
                "accuracy after pruning, after distillation",
                f"{accuracy['pruned']['thinking']:.0%}, {accuracy['distilled']['thinking']:.0%}"
                + (f" ({recovery:.0%} of the loss recovered)" if recovery is not None else ""),
            ],
            [
                "parameters of the aligned model, of the compressed model",
                f"{summary['parameters']['parent']:,}, {summary['parameters']['distilled']:,}",
            ],
            [f"decode time at context {hybrid[-1][0]:,}, relative to context {hybrid[0][0]}", growth],
            ["validation loss in FP8, relative to bf16", f"{summary['fp8_loss_gap']:+.2%}"],
        ],
    )  # fmt: skip


def _growth(points: list[list[float]]) -> str:
    return f"{points[-1][1] / points[0][1]:.1f}x"


def _data(report: Report, paths: RunPaths) -> None:
    measures = lineage(paths.data)["measures"]
    report.section("1. Data").text(
        "Text and code come from Python's documentation and standard library. Problems are generated, with "
        "reasoning traces of small "
        "equations, one per line. Filters drop documents of low quality, duplicates, and documents with test "
        "problems."
    )
    rows = [
        (name, store["documents"], store["tokens"], sum(store["dropped"].values()))
        for name, store in measures["stores"].items()
    ]
    report.table(["store", "documents", "tokens", "dropped"], rows)


def _pretraining(report: Report, paths: RunPaths, summary: dict[str, Any]) -> None:
    report.section("2. Pretraining").text(
        "A hybrid in the 12B's proportions (Mamba-2 and MLP layers, one attention layer) and a Transformer "
        "of the same size are trained "
        "on the same tokens, with a warmup-stable-decay schedule. Two short runs compare bf16 with the FP8 "
        "recipe: E4M3 in tiles of "
        "1x128 and blocks of 128x128, emulated with the same rounding, with the last steps in bf16."
    )
    names = {"hybrid": paths.base, "Transformer": paths.dense_base}
    report.figure(
        plots.lines({k: _curve(v, "pretrain") for k, v in names.items()}, "tokens", "loss"),
        "Pretraining loss of both models, moving average.",
    )
    runs = {"bf16": paths.short_bf16, "FP8": paths.short_fp8}
    report.figure(
        plots.lines({k: _curve(v, "pretrain") for k, v in runs.items()}, "tokens", "loss"),
        f"Loss of the two short runs. The validation loss in FP8 differs by {summary['fp8_loss_gap']:+.2%} "
        "from bf16.",
    )


def _curve(stage: Path, name: str) -> list[tuple[float, float]]:
    return _smoothed([(row["tokens"], row["loss"]) for row in series(stage, name)])


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The moving average of the points."""
    windows = [points[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(points))]
    return [(window[-1][0], sum(value for _, value in window) / len(window)) for window in windows]


def _alignment(report: Report, paths: RunPaths, summary: dict[str, Any]) -> None:
    before, after = summary["grpo"]["accuracy_before"], summary["grpo"]["accuracy_after"]
    report.section("3. Alignment").text(
        "SFT on chats with reasoning traces, without traces, and with truncated traces, so that the model "
        "can answer when its thinking "
        "is stopped. Then GRPO: the model samples several answers to each problem, and correct ones become "
        "more probable. The sampled "
        f"accuracy on held-out problems of the trained kind rises from {before:.0%} to {after:.0%}."
    )
    curves = {"hybrid": _curve(paths.sft, "sft"), "Transformer": _curve(paths.transformer, "sft")}
    report.figure(plots.lines(curves, "tokens", "loss"), "SFT loss on chats.")
    rewards = _smoothed([(row["step"], row["accuracy"]) for row in series(paths.aligned, "rollouts")])
    report.figure(
        plots.lines({"sampled": rewards}, "rollout step", "accuracy"),
        "Accuracy of the sampled completions during GRPO, moving average of five steps.",
    )


def _compression(
    report: Report, paths: RunPaths, summary: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    original, small = (summary["parameters"][name] for name in ("parent", "distilled"))
    measures = lineage(paths.distilled / "distilled")["measures"]
    report.section("4. Compression").text(
        "Layers, neurons, channels and heads get importance scores on calibration documents. Candidate "
        "architectures that fit the memory "
        f"budget are compared, the best is pruned from the aligned model ({small / original:.0%} of its "
        "parameters remain), and is "
        f"distilled from it. KL divergence from the aligned model: {measures['kl_before']:.3f} nats per "
        "token after pruning, "
        f"{measures['kl_after']:.4f} after distillation. Details of each step: `4-compress/report.html`."
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
        plots.bars([SHOWN[name] for name in models], heights, "accuracy", errors=errors),
        "Accuracy on held-out problems, with 95 % intervals.",
    )
    report.text(
        "The Transformer has the same pretraining and SFT, but no GRPO. At this size it is about as accurate "
        "as the hybrid before GRPO "
        f"(`sft`: {summary['accuracy']['sft']['thinking']:.0%} with thinking). The difference is in long "
        "contexts, see section 6."
    )


def _thinking(report: Report, recipes: Recipes, evaluation: dict[str, Any]) -> None:
    report.section("5. Thinking budget").text(
        "When the thinking budget is used up, the trace ends at its next newline, and the model answers."
    )
    curve = evaluation["models"]["parent"]["curve"]
    points = {"aligned": [(p["budget"], p["accuracy"], p["low"], p["high"]) for p in curve]}
    report.figure(
        plots.intervals(points, "thinking budget, tokens", "accuracy"), "Accuracy vs. thinking budget."
    )
    report.table(
        ["thinking budget", "accuracy", "well formed", "thinking tokens", "answer tokens"],
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
        plots.bars(families, bars, "accuracy"),
        f"Accuracy by family, {recipes.evaluate.problems} problems each.",
    )


def _context(report: Report, recipes: Recipes, evaluation: dict[str, Any]) -> None:
    decode = {
        name: evaluation["decode"][key]
        for name, key in {"hybrid": "parent", "Transformer": "transformer"}.items()
    }
    report.section("6. Long contexts").text(
        f"One decode step at batch size {recipes.evaluate.decode_batch}. The state of a Mamba layer has a "
        "fixed size, the KV cache of an "
        "attention layer grows with every token. The hybrid has one attention layer, so its time grows too, "
        "but more slowly."
    )
    times = {name: [(row["context"], row["milliseconds"]) for row in rows] for name, rows in decode.items()}
    report.figure(
        plots.lines(times, "context length, tokens", "ms per decode step", log_x=True),
        "Time of a decode step.",
    )
    cache_mib = {
        name: [(row["context"], row["sequence_bytes"] / MIB) for row in rows] for name, rows in decode.items()
    }
    report.figure(
        plots.lines(cache_mib, "context length, tokens", "MiB per sequence", log_x=True, log_y=True),
        "Cache memory of one sequence.",
    )


def _examples(report: Report, evaluation: dict[str, Any]) -> None:
    report.section("Example answers").text(
        "One held-out problem of each family, answered by the distilled model."
    )
    for example in evaluation["models"]["distilled"]["thinking"]["examples"]:
        report.text(f"`{example['prompt']}`: {'correct' if example['correct'] else 'wrong'}").code(
            example["text"]
        )


def _next(report: Report, paths: RunPaths, summary: dict[str, Any]) -> None:
    report.section("Next steps").text("Chat with the compressed model. Each stage has its own `report.html`.")
    report.code(chat_command(paths))
    rows = [(f"`{name}`", seconds) for name, seconds in summary["stage_seconds"].items()]
    report.table(["stage", "seconds"], rows)


def chat_command(paths: RunPaths) -> str:
    """The command that chats with the compressed model."""
    return f"nanohybrid chat {paths.distilled}"
