"""How the stage selects a shape: enumerate, evaluate without retraining, distill a few, take the fastest of
the best. All is logged.

metrics/search.jsonl               loss and agreement of each candidate      search/search.json    all
candidates, the selected one first metrics/successive_halving.jsonl   divergence of each after each round
search/latency.json   times of layers, where they were measured
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from nanohybrid.compress.candidate_quality import CandidateQuality, QualityEvaluator
from nanohybrid.compress.latency_table import LatencyTable, decode_timer
from nanohybrid.compress.recipe import ROOFLINE, CompressRecipe
from nanohybrid.compress.search import Grid, Search, Speed, enumerate_shapes, search, select, targets
from nanohybrid.compress.successive_halving import Distill, successive_halving
from nanohybrid.config import HybridConfig
from nanohybrid.estimate.budget import Budget
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.files import atomic_write
from nanohybrid.model import HybridLM
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.stages import Stage, progress

LATENCY = "latency.json"
HALVING = "successive_halving"
"""The log of the rounds, and the folder of their checkpoints."""


def evaluate_candidates(
    stage: Stage,
    grid: Grid,
    budget: Budget,
    speed: Speed,
    base: HybridLM | StreamedModel,
    scores: Importance,
    evaluator: QualityEvaluator,
) -> Search:
    """The shapes that fit, those that were evaluated first. Each quality is logged as soon as it is known."""
    found = enumerate_shapes(base.config, scores, grid, budget, speed)
    with progress("search", grid.max_evaluated, "shapes") as bar:
        return search(base, scores, evaluator, grid, found, bar.advance, _Qualities(stage))


def select_candidate(
    stage: Stage, recipe: CompressRecipe, found: Search, budget: Budget, distill: Distill
) -> Search:
    """Run successive halving where the recipe has it, select, and write all candidates to
    `search/search.json`."""
    if recipe.successive_halving.num_candidates > 1:
        folder, known = stage.directory / HALVING, _Divergences(stage)
        found = successive_halving(recipe.successive_halving, found, folder, distill, known)
    found = select(found, recipe.quality_tolerance)
    table = {
        "budget": str(budget),
        "budget_bytes": budget.bytes,
        "rejected_count": found.rejected,
        "quality_tolerance": recipe.quality_tolerance,
        "speed": recipe.speed,
        "candidates": [candidate.as_dict() for candidate in found.candidates],
    }
    atomic_write(stage.directory / "search" / "search.json", json.dumps(table, indent=2) + "\n")
    return found


def speed_of(
    kind: str,
    target_device: Device,
    run_device: str,
    grid: Grid,
    base: HybridConfig,
    scores: Importance,
    budget: Budget,
    folder: Path,
) -> Speed:
    """A function of a shape that gives its tokens a second.

    kind: roofline (of `target_device`), or measured (layers timed on `run_device`). Measured times are
    written to `folder`, and an interrupted run continues with these.
    """
    if kind == ROOFLINE:
        return lambda config: decode_step(config, budget).tokens_per_second(target_device)
    table = LatencyTable.open(budget, torch.device(run_device), base)
    used = folder / LATENCY
    if used.is_file():
        table = dataclasses.replace(table, times=LatencyTable.read(used))
    else:
        shapes = [target.config(base, scores) for target in targets(base, grid)]
        with progress("latency", len(set(base.pattern)) + 1, "kinds") as bar:
            table.measure(shapes, decode_timer(budget, torch.device(run_device)), bar.advance)
        dataclasses.replace(table, file=used).save()
    return table.tokens_per_second


class _Qualities(dict[str, CandidateQuality]):
    """Qualities by candidate; each is appended to the stage's log when it is set."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(
            (row["shape"], CandidateQuality(row["loss"], row["agreement"])) for row in stage.series("search")
        )
        self._stage = stage

    def __setitem__(self, shape: str, quality: CandidateQuality) -> None:
        super().__setitem__(shape, quality)
        self._stage.log("search", shape=shape, **dataclasses.asdict(quality))


class _Divergences(dict[tuple[int, str], float]):
    """Divergences by round and candidate; each is appended to the stage's log when it is set."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(((row["round"], row["shape"]), row["divergence"]) for row in stage.series(HALVING))
        self._stage = stage

    def __setitem__(self, key: tuple[int, str], divergence: float) -> None:
        super().__setitem__(key, divergence)
        self._stage.log(HALVING, round=key[0], shape=key[1], divergence=divergence)
