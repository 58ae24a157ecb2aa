"""The results of the quickstart as one object, from what its stages have measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.files import atomic_write

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Places:
    """Where each stage's output lies under the output directory."""

    out: Path

    @property
    def data(self) -> Path:
        return self.out / "1-data"

    @property
    def base(self) -> Path:
        return self.out / "2-pretrain" / "hybrid"

    @property
    def twin_bf16(self) -> Path:
        return self.out / "2-pretrain" / "short-bf16"

    @property
    def twin_fp8(self) -> Path:
        return self.out / "2-pretrain" / "short-fp8"

    @property
    def dense_base(self) -> Path:
        return self.out / "2-pretrain" / "transformer"

    @property
    def sft(self) -> Path:
        return self.out / "3-align" / "sft"

    @property
    def parent(self) -> Path:
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
        """Every stage that was run, in order; the parts of the compression are inside it."""
        return (
            self.data, self.base, self.twin_bf16, self.twin_fp8, self.dense_base,
            self.sft, self.transformer, self.parent, self.distilled, self.evaluation,
        )  # fmt: skip

    def name(self, stage: Path) -> str:
        """How a stage is called for people: its path below the output."""
        return stage.relative_to(self.out).as_posix()


def read_json(path: Path) -> Any:
    """A JSON file that a stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def series(stage: Path, name: str) -> list[dict[str, Any]]:
    """The rows that a stage logged under a name."""
    return [
        json.loads(line)
        for line in (stage / "metrics" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def lineage(stage: Path) -> dict[str, Any]:
    """What a stage says of itself."""
    found: dict[str, Any] = read_json(stage / "lineage.json")
    return found


def summarize(places: Places, models: Mapping[str, Path], wall: float) -> dict[str, Any]:
    """Everything that summary.json holds, and what the report draws.

    seconds: of all stages; more than this call's `wall` where a run was interrupted and resumed.
    """
    evaluation = read_json(places.evaluation / SUMMARY)
    records = {places.name(stage): lineage(stage) for stage in places.stages}
    accuracy = evaluation["accuracy"]
    parent, pruned, distilled = (accuracy[name]["thinking"] for name in ("parent", "pruned", "distilled"))
    losses = {
        name: record["measures"].get("validation_loss", 0.0)
        for name, record in records.items()
        if name.startswith("2-pretrain/")
    }
    bf16, fp8 = (losses[places.name(stage)] for stage in (places.twin_bf16, places.twin_fp8))
    return {
        "seconds": max(wall, sum(record["seconds"] for record in records.values())),
        "peak_memory_gib": max(record["peak_memory_bytes"] for record in records.values()) / 2**30,
        "tokens_trained": sum(
            record["tokens"] for name, record in records.items() if name != places.name(places.data)
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
            key: lineage(places.parent)["measures"][key] for key in ("accuracy_before", "accuracy_after")
        },
        "parameters": {name: evaluation["models"][name]["shape"]["parameters"] for name in models},
        "stage_seconds": {name: record["seconds"] for name, record in records.items()},
        "checkpoints": {name: places.name(path) for name, path in models.items()},
    }


def write_summary(places: Places, summary: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json` and return what it holds."""
    atomic_write(places.out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary
