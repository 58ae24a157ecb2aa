"""The report on a quantized model: quality, bytes, and the error of each matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanohybrid.estimate.units import amount
from nanohybrid.evaluate.accuracy import add_accuracy, format_accuracy
from nanohybrid.quantize.calibrate import QuantizationQuality
from nanohybrid.quantize.layerwise import Quantization
from nanohybrid.stages.plots import bars, lines
from nanohybrid.stages.report import Report


def quantize_report(found: Quantization, model: Path, answers: Mapping[str, Mapping[str, Any]]) -> Report:
    """The report of the checkpoint `model`. answers: the accuracy of each model on held-out problems, empty
    where none ran."""
    before, after = sum(found.bytes_before.values()), sum(found.bytes_after.values())
    report = Report(f"{model.resolve().name} in {found.format}")
    report.text(
        f"{amount(before)} became {amount(after)}: {after / before:.0%}. Load it as any checkpoint: "
        "`nanohybrid chat DIR`."
    )
    if found.quality is not None:
        _quality(report, found, found.quality)
    if answers:
        report.section("Accuracy").table(
            ["", *answers], [["accuracy", *map(format_accuracy, answers.values())]]
        )
        add_accuracy(report, answers)
    report.section("Bytes")
    report.table(
        ["part", "before", "after"],
        [
            [kind, amount(count), amount(found.bytes_after[kind])]
            for kind, count in found.bytes_before.items()
        ],
    )
    kinds = list(found.bytes_before)
    sizes = {
        name: [table[kind] / 2**20 for kind in kinds]
        for name, table in (("before", found.bytes_before), ("after", found.bytes_after))
    }
    report.figure(
        bars(kinds, sizes, "MiB"),
        "The linears of the layers and an untied head are quantized; everything else is unchanged.",
    )
    if found.unquantized:
        names = ", ".join(f"`{name}`" for name in found.unquantized)
        report.text(f"Not quantized, since {found.format} cannot hold their rows: {names}.")
    report.section("Errors of the weights")
    report.figure(
        lines(_by_matrix(found.errors), "layer", "error / norm of the weight"),
        "The norm of the rounding error of each matrix, relative to the norm of the matrix.",
    )
    return report


def _quality(report: Report, found: Quantization, quality: QuantizationQuality) -> None:
    change = math.expm1(quality.loss_after - quality.loss_before)
    report.section("Quality")
    report.table(
        ["on documents", "before", "after"],
        [
            [
                "perplexity",
                f"{math.exp(quality.loss_before):.4f}",
                f"{math.exp(quality.loss_after):.4f} ({change:+.3%})",
            ]
        ],
    )
    report.text(
        f"The most probable next token is the same at **{quality.agreement:.2%}** of "
        f"{quality.targets:,} targets. The mean KL "
        f"divergence from the original is {quality.divergence:.2e} nats."
        + (" The scales were chosen on other documents than these." if found.format == "int4" else "")
    )
    points = {"hidden states": [(float(layer), drift) for layer, drift in enumerate(found.drift, 1)]}
    report.figure(
        lines(points, "layer", "difference / norm"),
        "The difference of the hidden states from the original's after each layer, relative to their norm.",
    )


def _by_matrix(errors: dict[str, float]) -> dict[str, list[tuple[float, float]]]:
    """Points (layer, error) by the matrix's name in its layer; the head is placed after the last layer."""
    result: dict[str, list[tuple[float, float]]] = {}
    last = max((int(name.split(".")[2]) for name in errors if name.startswith("backbone.layers.")), default=0)
    for name, error in errors.items():
        parts = name.split(".")
        layer = int(parts[2]) + 1 if len(parts) > 3 else last + 2
        result.setdefault(parts[-2], []).append((float(layer), error))
    return {name: sorted(points) for name, points in result.items()}
