"""The last sections of a compression's page: what learning, and 8 or 4 bits, made of the model, and how to run it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanohybrid.compress.post_training import FOLDER
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.units import amount
from nanohybrid.evaluate.accuracy import add_accuracy, format_accuracy
from nanohybrid.export.architecture import architecture
from nanohybrid.stages import Report, plots

QUANTIZED, AFTER = "quantized", "after"


def through_the_stages(
    report: Report, directory: Path, config: HybridConfig, measured: Mapping[str, Any]
) -> None:
    """Distillation, alignment, quantization and right answers, each where there was one, and the commands for the result."""
    _distillation(report, directory)
    if AFTER in measured:
        _aligned(report, measured[AFTER])
    if QUANTIZED in measured:
        _quantized(report, measured[QUANTIZED])
    _steps(report, measured)
    _to_use(report, directory.name.removesuffix(".partial"), config, measured)


def _distillation(report: Report, directory: Path) -> None:
    folder = directory / "distilled"
    if not folder.is_dir():
        report.section("Learning from the parent").text(
            "There was nothing to learn: the parent fits whole, so nothing was cut."
        )
        return
    rows = [json.loads(line) for line in (folder / "metrics" / "distill.jsonl").read_text().splitlines()]
    measures = json.loads((folder / "lineage.json").read_text())["measures"]
    report.section("Learning from the parent").text(
        f"The cut model read {rows[-1]['tokens']:,} tokens and learned what the parent expects next, the whole distribution and not only "
        f"the right token (forward KL on the logits). Divergence from the parent, in nats a token: {measures['kl_before']:.4f} before, "
        f"{measures['kl_after']:.4f} after."
    )
    between = "apart_after" in measures
    if between:
        report.text(
            "Hidden states between the layers counted too. Their distance from the parent's, over the channels that stayed: "
            f"{measures['apart_before']:.4f} before, {measures['apart_after']:.4f} after."
        )
    curve = {"loss" if between else "KL": [(row["tokens"], row["loss"]) for row in rows]}
    what = (
        "Divergence from the parent, and the weighted distance of hidden states,"
        if between
        else "Divergence from the parent"
    )
    report.figure(
        plots.lines(curve, "tokens", "nats a token", log_y=True), f"{what} on the training documents."
    )


def _aligned(report: Report, stages: Sequence[Mapping[str, Any]]) -> None:
    """What each stage after distillation did, in its own measure."""
    report.section("Aligned again").text(
        "What its parent could not give back, the smaller model learned in short stages of its own, each from where the one before left it."
    )
    report.table(
        ["stage", "tokens", "what came of it"],
        [[stage["name"], stage["tokens"] or "", _outcome(stage)] for stage in stages],
    )
    report.text(
        f"Each has its recipe and its curves in `{FOLDER}/`, and its line in the table of all steps below."
    )


def _outcome(stage: Mapping[str, Any]) -> str:
    """A stage's own measure in words."""
    if stage["kind"] == "grpo":
        return f"sampled accuracy on held-out problems: {stage['accuracy_before']:.1%} before, {stage['accuracy_after']:.1%} after"
    if stage["kind"] == "distill":
        return f"divergence from the parent: {stage['kl_before']:.4f} nats a token before, {stage['kl_after']:.4f} after"
    if stage["kind"] == "sft":
        return f"loss on its chats at the end: {stage['final_loss']:.4f} nats"
    return f"{1 - stage['weight']:.0%} of the model before the last stage, {stage['weight']:.0%} of the one after it"


def _quantized(report: Report, found: Mapping[str, Any]) -> None:
    """What the last step saved and cost; `found` is what the stage `quantize` measured."""
    left = len(found["not_quantized"])
    report.section(f"In {found['format']}").text(
        f"The matrices of the layers and the head became {found['format']} codes with scales: {amount(found['bytes_before'])} on the disk "
        f"became {amount(found['bytes_after'])}. The likeliest next token is the one from before at {found['top1_agreement']:.2%} "
        f"of {found['targets']:,} targets, and the mean KL divergence from the model before is {found['kl_divergence']:.2e} nats."
        + (f" {left} matrices stayed as they were: the format has no form for their rows." if left else "")
    )
    perplexity = [
        f"{found['perplexity_before']:.4f}",
        f"{found['perplexity_after']:.4f} ({found['perplexity_change']:+.3%})",
    ]
    rows = [["perplexity", *perplexity], ["error of the weights", "", f"{found['weight_error']:.2%}"]]
    rows += [[f"bytes, {kind}", *map(amount, pair)] for kind, pair in found["bytes_by_kind"].items()]
    report.table(["", "before", found["format"]], rows)
    report.text("More of it, layer by layer: `quantized/report.html`.")


def _steps(report: Report, measured: Mapping[str, Any]) -> None:
    """One table over all steps, and a picture of the right answers where problems were asked."""
    accuracy = measured.get("accuracy", {})
    report.section("Through the steps")
    rows = [
        [name, loss, f"{measured['agreement'][name]:.1%}"]
        + ([format_accuracy(accuracy[name])] if accuracy else [])
        for name, loss in measured["losses"].items()
    ]
    report.table(["", "loss, nats", "agrees with the parent", *(["right answers"] if accuracy else [])], rows)
    report.text(
        "Loss: the mean surprise at the next token of the documents that importance was measured on; lower is better. "
        + (
            ""
            if accuracy
            else "No problems were asked: `--problems 40` asks 40 of each family, of every model in this table."
        )
    )
    if accuracy:
        add_accuracy(report, accuracy)


def _to_use(report: Report, name: str, config: HybridConfig, measured: Mapping[str, Any]) -> None:
    """The commands that run the result."""
    judge = "" if measured.get("accuracy") else ": judge it by `evaluate`, on problems that it has not seen"
    report.section("To use it").text(
        "The directory is a checkpoint in the layout of the parent. Loss and agreement above are on documents that it may have learned "
        f"from{judge}."
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
