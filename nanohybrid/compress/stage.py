"""The stage `compress`: importance -> search -> prune -> distill, each in a directory of its own under the output.

    importance/   scores of every axis and layer             search/     every shape that fits the budget, the best first
    pruned/       the chosen shape, and kept.json            distilled/  the same after learning from the parent

The output itself is the distilled checkpoint. Every part is found again after a kill, and none is done twice.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanohybrid.checkpoint import load
from nanohybrid.compress.budget import DTYPES, Budget
from nanohybrid.compress.calibration import Calibration
from nanohybrid.compress.distill import DistillRecipe, distill
from nanohybrid.compress.importance import FILE, Importance
from nanohybrid.compress.measure import importance_of
from nanohybrid.compress.prune_stage import PruneRecipe, prune, sizes
from nanohybrid.compress.report import compression_report
from nanohybrid.compress.search import Grid, Search, search
from nanohybrid.config import HybridConfig
from nanohybrid.data import TokenStore
from nanohybrid.errors import ConfigError
from nanohybrid.evaluate.perplexity import loss_of
from nanohybrid.extras import require
from nanohybrid.files import atomic_write
from nanohybrid.model import Footprint, HybridLM
from nanohybrid.stages import Stage, open_stage, progress
from nanohybrid.stages.output import read_record

STAGE_FILES = ("recipe.toml", "lineage.json", "report.html")


@dataclass(frozen=True)
class CompressRecipe:
    """How to make a model smaller."""

    budget_bytes: int | None = None
    """Memory for weights, keys and values, and states; without it, `budget_share` decides."""
    budget_share: float = 0.72
    """Share of what the parent takes itself."""
    context: int = 4096
    """Tokens of a sequence for which the budget must suffice."""
    batch: int = 1
    """Sequences at once."""
    dtype: str = "bf16"
    """Of the weights, keys and values at work: bf16, fp16 or fp32."""
    samples: int = 256
    """Calibration documents."""
    length: int = 512
    """Tokens of each, at most."""
    outgoing: bool = True
    """Multiply activations by the norm of the weights that read them."""
    grid: Grid = field(default_factory=Grid)
    distill: DistillRecipe = field(default_factory=DistillRecipe)

    def __post_init__(self) -> None:
        if not 0 < self.budget_share <= 1:
            raise ConfigError(f"budget_share is {self.budget_share}: a share of the parent is above 0 and at most 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}: compress writes {', '.join(DTYPES)}; `nanohybrid plan compress` knows more")
        Budget(1 if self.budget_bytes is None else self.budget_bytes, self.context, self.batch, self.dtype)

    def budget(self, parent: HybridConfig) -> Budget:
        """The budget in bytes."""
        if self.budget_bytes is not None:
            return Budget(self.budget_bytes, self.context, self.batch, self.dtype)
        total = Footprint.of(parent, DTYPES[self.dtype]).total(self.context, self.batch)
        return Budget(int(total * self.budget_share), self.context, self.batch, self.dtype)


def compress(recipe: CompressRecipe, model: Path, data: Path, out: Path, pretraining: Path | None = None) -> Path:
    """Compress the checkpoint `model` to a budget; `data` holds the documents to calibrate with and to learn from again.

    data and pretraining: as in `distill`.
    """
    require("matplotlib", "train")  # for the report at the end
    inputs = {"model": model, "data": data} | ({"pretraining": pretraining} if pretraining else {})
    with open_stage(out, "compress", recipe, inputs, recipe.distill.seed) as stage:
        if stage.complete:
            return out
        parent = load(model, dtype=torch.float32).eval()
        calibration = Calibration.read(data, model, recipe.samples, recipe.length)
        TokenStore.from_documents(calibration.samples).check_ids(parent.config.vocab_size, data)
        rounds = max(recipe.grid.drop_layers)
        scores = importance_of(parent, calibration, stage.directory / "importance", recipe.outgoing, rounds)
        found = find_shape(stage, recipe, parent, scores, calibration)
        prune_recipe = PruneRecipe(found.chosen.target, recipe.outgoing, recipe.samples, recipe.length)
        pruned = prune(prune_recipe, model, stage.directory / "pruned", importance=stage.directory / "importance" / FILE)
        distilled = distill(recipe.distill, pruned, model, data, stage.directory / "distilled", pretraining)
        stage.record["tokens"] = read_record(distilled)["tokens"]
        losses = {name: loss_of(load(path, dtype=torch.float32), calibration.batches()).loss for name, path in (("distilled", distilled),)}
        losses |= {"parent": loss_of(parent, calibration.batches()).loss, "pruned": float(found.chosen.loss or 0.0)}
        stage.measure(losses=losses, **sizes("parent", parent.config), **sizes("pruned", found.chosen.config))
        adopt(distilled, stage.directory)
        shutil.copyfile(pruned / "kept.json", stage.directory / "kept.json")
        report = compression_report(recipe.budget(parent.config), parent.config, scores, found, losses, stage.directory)
        report.write(stage.directory / "report.html")
    return out


def find_shape(stage: Stage, recipe: CompressRecipe, parent: HybridLM, scores: Importance, calibration: Calibration) -> Search:
    """Search, with each loss logged as it is measured, and the table of candidates written to `search/`."""
    budget = recipe.budget(parent.config)
    known = _Losses(stage)
    with progress("search", recipe.grid.tried, "shapes") as bar:
        found = search(parent, scores, calibration, recipe.grid, budget, bar.advance, known)
    table = {"budget": str(budget), "budget_bytes": budget.bytes, "rejected_count": found.rejected}
    table |= {"candidates": [candidate.as_dict() for candidate in found.candidates]}
    atomic_write(stage.directory / "search" / "search.json", json.dumps(table, indent=2) + "\n")
    return found


class _Losses(dict[str, float]):
    """Losses by shape, each written to the stage's log as soon as it is known."""

    def __init__(self, stage: Stage) -> None:
        super().__init__((row["shape"], row["loss"]) for row in stage.series("search"))
        self._stage = stage

    def __setitem__(self, shape: str, loss: float) -> None:
        super().__setitem__(shape, loss)
        self._stage.log("search", shape=shape, loss=loss)


def adopt(checkpoint: Path, directory: Path) -> None:
    """Give `directory` the files of a checkpoint below it: by hard links where the file system can, else as copies."""
    for file in sorted(checkpoint.iterdir()):
        if not file.is_file() or file.name in STAGE_FILES:
            continue
        target = directory / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
