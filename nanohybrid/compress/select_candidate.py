"""How the stage chooses a shape: enumerate, try without retraining, race, and take the fastest of the best. All of it is logged.

metrics/search.jsonl    loss and agreement of each shape that was tried      search/search.json   the whole table, the choice first
metrics/race.jsonl      divergence of each shape after each round            search/latency.json  times of layers, where they were measured
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from nanohybrid.compress.candidate_quality import Judge, Quality
from nanohybrid.compress.latency_table import LatencyTable, decode_timer
from nanohybrid.compress.recipe import ROOFLINE, CompressRecipe
from nanohybrid.compress.search import Grid, Search, Speed, choose, enumerate_shapes, search, targets
from nanohybrid.compress.successive_halving import Learn, race
from nanohybrid.config import HybridConfig
from nanohybrid.estimate.budget import Budget
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.files import atomic_write
from nanohybrid.model import HybridLM
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import Stored
from nanohybrid.stages import Stage, progress

LATENCY = "latency.json"


def try_shapes(
    stage: Stage,
    grid: Grid,
    budget: Budget,
    speed: Speed,
    parent: HybridLM | Stored,
    scores: Importance,
    judge: Judge,
) -> Search:
    """The shapes that fit, those tried first, each quality logged as soon as it is known."""
    found = enumerate_shapes(parent.config, scores, grid, budget, speed)
    with progress("search", grid.tried, "shapes") as bar:
        return search(parent, scores, judge, grid, found, bar.advance, _Qualities(stage))


def decide(stage: Stage, recipe: CompressRecipe, found: Search, budget: Budget, learn: Learn) -> Search:
    """Race where the recipe wants one, choose, and write the table to `search/`."""
    if recipe.race.entrants > 1:
        found = race(recipe.race, found, stage.directory / "race", learn, _Divergences(stage))
    found = choose(found, recipe.near)
    table = {
        "budget": str(budget),
        "budget_bytes": budget.bytes,
        "rejected_count": found.rejected,
        "near": recipe.near,
    }
    table |= {"speed": recipe.speed, "candidates": [candidate.as_dict() for candidate in found.candidates]}
    atomic_write(stage.directory / "search" / "search.json", json.dumps(table, indent=2) + "\n")
    return found


def speed_of(
    kind: str,
    wanted: Device,
    here: str,
    grid: Grid,
    parent: HybridConfig,
    scores: Importance,
    budget: Budget,
    folder: Path,
) -> Speed:
    """Tokens a second of a shape: the roofline of the device that it is wanted for, or layers timed on the one that is here.

    The times that were used lie in `folder` afterwards, and are what an interrupted run goes on with.
    """
    if kind == ROOFLINE:
        return lambda config: decode_step(config, budget).tokens_per_second(wanted)
    table = LatencyTable.open(budget, torch.device(here), parent)
    used = folder / LATENCY
    if used.is_file():
        table = dataclasses.replace(table, times=LatencyTable.read(used))
    else:
        shapes = [target.config(parent, scores) for target in targets(parent, grid)]
        with progress("latency", len(set(parent.pattern)) + 1, "kinds") as bar:
            table.measure(shapes, decode_timer(budget, torch.device(here)), bar.advance)
        dataclasses.replace(table, file=used).save()
    return table.tokens_per_second


class _Qualities(dict[str, Quality]):
    """Qualities by shape, each written to the stage's log as soon as it is known."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(
            (row["shape"], Quality(row["loss"], row["agreement"])) for row in stage.series("search")
        )
        self._stage = stage

    def __setitem__(self, shape: str, quality: Quality) -> None:
        super().__setitem__(shape, quality)
        self._stage.log("search", shape=shape, **dataclasses.asdict(quality))


class _Divergences(dict[tuple[int, str], float]):
    """Divergences by round and shape, each written to the stage's log as soon as it is known."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(((row["round"], row["shape"]), row["divergence"]) for row in stage.series("race"))
        self._stage = stage

    def __setitem__(self, key: tuple[int, str], divergence: float) -> None:
        super().__setitem__(key, divergence)
        self._stage.log("race", round=key[0], shape=key[1], divergence=divergence)
