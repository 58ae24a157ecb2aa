"""The last sections of a compression's report: distillation, post-training, quantization, accuracy, and how
to run the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.llama_cpp import architecture
from nanohybrid.compress.post_training import FOLDER
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.units import amount
from nanohybrid.evaluate.accuracy import add_accuracy, format_accuracy
from nanohybrid.stages import Report, plots

QUANTIZED, POST_TRAINING = "quantized", "post_training"
"""Names of measures."""


def report_stages(report: Report, directory: Path, config: HybridConfig, measured: Mapping[str, Any]) -> None:
    """Add a section for each step that was run, and one with the commands for the result."""
    _distillation(report, directory)
    if POST_TRAINING in measured:
        _post_training(report, measured[POST_TRAINING])
    if QUANTIZED in measured:
        _quantized(report, measured[QUANTIZED])
    _steps(report, measured)
    _commands(report, directory.name.removesuffix(".partial"), config, measured)


def _distillation(report: Report, directory: Path) -> None:
    folder = directory / "distilled"
    if not folder.is_dir():
        report.section("Distillation").text("Skipped: the base model fits, so nothing was pruned.")
        return
    rows = [json.loads(line) for line in (folder / "metrics" / "distill.jsonl").read_text().splitlines()]
    measures = json.loads((folder / "lineage.json").read_text())["measures"]
    report.section("Distillation").text(
        f"The pruned model was trained on {rows[-1]['tokens']:,} tokens to give the base model's "
        "distribution of the next token "
        "(forward KL on the logits). Divergence from the base model, in nats a token: "
        f"{measures['kl_before']:.4f} before, "
        f"{measures['kl_after']:.4f} after."
    )
    hidden_states = "hidden_state_loss_after" in measures
    if hidden_states:
        report.text(
            "Hidden states counted too. Their distance from the base model's, over the channels that remain: "
            f"{measures['hidden_state_loss_before']:.4f} before, "
            f"{measures['hidden_state_loss_after']:.4f} after."
        )
    curve = {"loss" if hidden_states else "KL": [(row["tokens"], row["loss"]) for row in rows]}
    what = "Divergence from the base model"
    what += ", and the weighted distance of hidden states," if hidden_states else ""
    report.figure(
        plots.lines(curve, "tokens", "nats a token", log_y=True), f"{what} on the training documents."
    )


def _post_training(report: Report, stages: Sequence[Mapping[str, Any]]) -> None:
    """What each stage after distillation did, in its own measure."""
    report.section("Post-training").text(
        "After distillation the model was trained in short stages of its own, each from the "
        "checkpoint of the one before."
    )
    report.table(
        ["stage", "tokens", "result"],
        [[stage["name"], stage["tokens"] or "", _outcome(stage)] for stage in stages],
    )
    report.text(
        f"Each has its recipe and its curves in `{FOLDER}/`, and a row in the table of all steps below."
    )


def _outcome(stage: Mapping[str, Any]) -> str:
    """A stage's own measure as a sentence."""
    if stage["kind"] == "grpo":
        before, after = stage["accuracy_before"], stage["accuracy_after"]
        return f"sampled accuracy on held-out problems: {before:.1%} before, {after:.1%} after"
    if stage["kind"] == "distill":
        before, after = stage["kl_before"], stage["kl_after"]
        return f"divergence from the teacher: {before:.4f} nats a token before, {after:.4f} after"
    if stage["kind"] == "sft":
        return f"loss on its chats at the end: {stage['final_loss']:.4f} nats"
    weight = stage["weight"]
    return f"{1 - weight:.0%} of the model before the last stage, {weight:.0%} of the one after it"


def _quantized(report: Report, found: Mapping[str, Any]) -> None:
    """Bytes and quality of the quantized checkpoint. found: the measures of the stage `quantize`."""
    count, before, after = len(found["not_quantized"]), found["perplexity_before"], found["perplexity_after"]
    report.section(f"In {found['format']}").text(
        f"The matrices of the layers and the head were quantized to {found['format']}: "
        f"{amount(found['bytes_before'])} on disk became "
        f"{amount(found['bytes_after'])}. The most probable next token is the same as before at "
        f"{found['top1_agreement']:.2%} of "
        f"{found['targets']:,} targets. The mean KL divergence from the model before is "
        f"{found['kl_divergence']:.2e} nats."
        + (f" {count} matrices were not quantized: the format cannot hold their rows." if count else "")
    )
    rows = [["perplexity", f"{before:.4f}", f"{after:.4f} ({found['perplexity_change']:+.3%})"]]
    rows += [["error of the weights", "", f"{found['weight_error']:.2%}"]]
    rows += [[f"bytes, {kind}", *map(amount, pair)] for kind, pair in found["bytes_by_kind"].items()]
    report.table(["", "before", found["format"]], rows)
    report.text("Layer by layer: `quantized/report.html`.")


def _steps(report: Report, measured: Mapping[str, Any]) -> None:
    """A table of all steps, and a figure of the accuracy where problems were evaluated."""
    accuracy = measured.get("accuracy", {})
    report.section("All steps")
    rows = [
        [name, loss, f"{measured['agreement'][name]:.1%}"]
        + ([format_accuracy(accuracy[name])] if accuracy else [])
        for name, loss in measured["losses"].items()
    ]
    heads = ["", "loss, nats", "agrees with the base model", *(["accuracy"] if accuracy else [])]
    report.table(heads, rows)
    report.text(
        "Loss: the cross-entropy of the next token of the calibration documents; lower is better. "
        "The base model is `parent`. "
        + (
            ""
            if accuracy
            else "`--problems 40` evaluates every model of this table on 40 problems of each task."
        )
    )
    if accuracy:
        add_accuracy(report, accuracy)


def _commands(report: Report, name: str, config: HybridConfig, measured: Mapping[str, Any]) -> None:
    """The commands that run the result."""
    hint = "" if measured.get("accuracy") else ": use `evaluate`, on held-out problems, to judge it"
    report.section("How to run it").text(
        "The directory is a checkpoint in the layout of the base model. Loss and agreement above are "
        "on documents that may have "
        f"been trained on{hint}."
    )
    lines = [f"nanohybrid chat {name}", f"nanohybrid serve {name}"]
    lines += [f"nanohybrid evaluate parent=PARENT result={name} --out {name}-evaluation"]
    if "gguf" in measured:
        gguf = measured["gguf"]
        report.text(
            f"For llama.cpp: `{gguf['file']}` in it, {amount(gguf['bytes'])}, made from `{gguf['from']}/`."
        )
        lines += [f"llama-cli -m {name}/{gguf['file']}"]
    elif _known_to_llama_cpp(config):
        lines += [f"nanohybrid export gguf {name} {name}.gguf --type q8_0"]
    report.code("\n".join(lines))


def _known_to_llama_cpp(config: HybridConfig) -> bool:
    try:
        architecture(config)
    except InputError:
        return False
    return True
