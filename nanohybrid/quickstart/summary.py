"""The results of the quickstart as one JSON object, from the results of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.files import atomic_write

SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunPaths:
    """The output directories of the stages of one run."""

    out: Path

    @property
    def data(self) -> Path:
        return self.out / "1-data"

    @property
    def base(self) -> Path:
        return self.out / "2-pretrain" / "hybrid"

    @property
    def short_bf16(self) -> Path:
        return self.out / "2-pretrain" / "short-bf16"

    @property
    def short_fp8(self) -> Path:
        return self.out / "2-pretrain" / "short-fp8"

    @property
    def dense_base(self) -> Path:
        return self.out / "2-pretrain" / "transformer"

    @property
    def sft(self) -> Path:
        return self.out / "3-align" / "sft"

    @property
    def aligned(self) -> Path:
        return self.out / "3-align" / "grpo"

    @property
    def transformer(self) -> Path:
        return self.out / "3-align" / "transformer"

    @property
    def distilled(self) -> Path:
        return self.out / "4-compress"

    @property
    def pruned(self) -> Path:
        return self.distilled / "pruned"

    @property
    def evaluation(self) -> Path:
        return self.out / "5-evaluate"

    @property
    def stages(self) -> tuple[Path, ...]:
        """All stages in order; the parts of compression are in its directory."""
        return (
            self.data, self.base, self.short_bf16, self.short_fp8, self.dense_base,
            self.sft, self.transformer, self.aligned, self.distilled, self.evaluation,
        )  # fmt: skip

    def name(self, stage: Path) -> str:
        """The name of a stage: its path below the output directory."""
        return stage.relative_to(self.out).as_posix()


def read_json(path: Path) -> Any:
    """A JSON file that a stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def series(stage: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a stage's log."""
    return [
        json.loads(line)
        for line in (stage / "metrics" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def lineage(stage: Path) -> dict[str, Any]:
    """The lineage of a stage."""
    found: dict[str, Any] = read_json(stage / "lineage.json")
    return found


def summarize(paths: RunPaths, models: Mapping[str, Path], wall: float) -> dict[str, Any]:
    """The contents of summary.json, which the report shows.

    wall: seconds of this call. `seconds` of the summary counts all stages, also those of an earlier,
    interrupted call.
    """
    evaluation = read_json(paths.evaluation / SUMMARY)
    records = {paths.name(stage): lineage(stage) for stage in paths.stages}
    accuracy = evaluation["accuracy"]
    parent, pruned, distilled = (accuracy[name]["thinking"] for name in ("parent", "pruned", "distilled"))
    losses = {
        name: record["measures"].get("validation_loss", 0.0)
        for name, record in records.items()
        if name.startswith("2-pretrain/")
    }
    bf16, fp8 = (losses[paths.name(stage)] for stage in (paths.short_bf16, paths.short_fp8))
    return {
        "seconds": max(wall, sum(record["seconds"] for record in records.values())),
        "peak_memory_gib": max(record["peak_memory_bytes"] for record in records.values()) / 2**30,
        "tokens_trained": sum(
            record["tokens"] for name, record in records.items() if name != paths.name(paths.data)
        ),
        "fp8_loss_gap": fp8 / bf16 - 1,
        "accuracy": accuracy,
        "budget_curve": evaluation["budget_curve"]["parent"],
        "distillation_recovery": (distilled - pruned) / (parent - pruned) if parent > pruned else None,
        "decode_ms": {
            "hybrid": evaluation["decode_ms"]["parent"],
            "transformer": evaluation["decode_ms"]["transformer"],
        },
        "grpo": {
            key: lineage(paths.aligned)["measures"][key] for key in ("accuracy_before", "accuracy_after")
        },
        "parameters": {name: evaluation["models"][name]["shape"]["parameters"] for name in models},
        "stage_seconds": {name: record["seconds"] for name, record in records.items()},
        "checkpoints": {name: paths.name(path) for name, path in models.items()},
    }


def write_summary(paths: RunPaths, summary: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json` and return its contents."""
    atomic_write(paths.out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary
