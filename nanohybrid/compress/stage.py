"""The stage `compress`: importance -> search -> prune -> distill (-> post-training, -> quantize), each in a
directory of its own.

    importance/   scores of every axis and layer
    search/       every shape that fits the budget, the selected one first
    pruned/       the selected shape, and its pruning mask
    distilled/    the same after distillation from the base model
    aligned/      that after the recipe's further stages
    quantized/    the last of them with quantized matrices

Where the base model fits the budget, nothing is pruned, and there is nothing to recover: distilled/ and
aligned/ are left out. The output itself is the last of these checkpoints. A killed run continues with every
part that was completed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanohybrid.checkpoint import CheckpointReader, load, load_config, refuse_quantized, resolve
from nanohybrid.compress.candidate_quality import CandidateQuality, QualityEvaluator
from nanohybrid.compress.default_calibration import documents_for
from nanohybrid.compress.finish import QUANTIZED, check_last_steps, export_gguf, quantized
from nanohybrid.compress.inference_cost import measure_inference
from nanohybrid.compress.post_training import FOLDER, outcomes, run_post_training
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.report import compression_report
from nanohybrid.compress.search import Candidate, Search
from nanohybrid.compress.select_candidate import evaluate_candidates, select_candidate, speed_of
from nanohybrid.config import HybridConfig
from nanohybrid.data import TokenStore
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.estimate.budget import Budget
from nanohybrid.estimate.devices import device
from nanohybrid.evaluate.accuracy import measure_accuracy
from nanohybrid.extras import require
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.importance import FILE, Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.measure import importance_of
from nanohybrid.prune.selection import copy_mask
from nanohybrid.prune.stage import PruneRecipe, prune, sizes
from nanohybrid.prune.streaming import should_stream
from nanohybrid.stages import Stage, open_stage
from nanohybrid.stages.output import read_record

STAGE_FILES = ("recipe.toml", "lineage.json", "report.html")
PARENT = "parent"
"""The base model's name among the steps, in measures and reports."""


def compress(
    recipe: CompressRecipe,
    model: Path,
    data: Path | None,
    out: Path,
    pretraining: Path | None = None,
    run_on: str = "cpu",
) -> Path:
    """Compress the checkpoint `model` to a budget. Returns `out`.

    data: documents to calibrate with and to distill on; None: the model's own chats, else text that every
    installation has (default_calibration.py). data and pretraining otherwise as in `distill`. run_on: where
    everything is computed; the recipe's `device` is what the result is for. Raises InputError where no shape
    fits the budget.
    """
    require("matplotlib", "train")  # for the report
    model = resolve(model)
    refuse_quantized(model)
    check_last_steps(recipe, model, pretraining, run_on)
    inputs = (
        {"model": model}
        | ({"data": data} if data else {})
        | ({"pretraining": pretraining} if pretraining else {})
    )
    with open_stage(out, "compress", recipe, inputs, recipe.distill.seed, run_on) as stage:
        if not stage.complete:
            data = data or documents_for(model, stage.directory / "documents")
            Compression(recipe, stage, model, data, pretraining, run_on).run()
    return out


@dataclass
class Compression:
    """One run of the stage, and its inputs."""

    recipe: CompressRecipe
    stage: Stage
    model: Path
    data: Path
    pretraining: Path | None
    run_on: str

    def run(self) -> None:
        """All steps in order, then the measures and the report."""
        recipe, stage = self.recipe, self.stage
        if (
            "streamed" not in stage.measures
        ):  # decided once: a resumed run continues in the same way, bit for bit
            stage.measure(streamed=should_stream(self.model, recipe.stream, self.run_on))
        base = load_config(self.model)
        budget = recipe.budget(base)
        scores, evaluator, found = self.search(base, budget)
        found = select_candidate(stage, recipe, found, budget, self.short_distillation)
        pruned = self.prune(found.selected, stage.directory / "pruned")
        steps, last = {PARENT: self.model}, pruned  # without pruning, `pruned` is the whole base model
        if found.selected.config != base:
            recovered = self.recover(pruned)
            steps, last = steps | {"pruned": pruned, **recovered}, list(recovered.values())[-1]
        ends = quantized(recipe, last, stage.directory / QUANTIZED, self.data, self.run_on)
        steps, result = steps | ends, next(iter(ends.values()), last)
        self.measure(base, budget, found, steps, last, result, evaluator)
        link_checkpoint(result, stage.directory)
        copy_mask(pruned, stage.directory, replace=True)  # a file of its own, no link
        report = compression_report(budget, base, scores, found, stage.record, stage.directory)
        report.write(stage.directory / "report.html")

    def search(self, base: HybridConfig, budget: Budget) -> tuple[Importance, QualityEvaluator, Search]:
        """The scores of the base model, what candidates are compared by, and the shapes that fit."""
        recipe, stage = self.recipe, self.stage
        grid = recipe.grid_for(base)
        calibration = Calibration.read(
            self.data, self.model, recipe.num_calibration_samples, recipe.max_calibration_length
        )
        TokenStore.from_documents(calibration.samples).check_ids(base.vocab_size, self.data)
        with self.opened(self.model) as model:
            scores = importance_of(
                model if isinstance(model, HybridLM) else self.model,
                calibration,
                stage.directory / "importance",
                recipe.scale_by_outgoing_norm,
                max(grid.drop_layers),
                recipe.depth,
                stage.measures["streamed"],
                self.run_on,
            )
            target_device, folder = device(recipe.device or "cpu"), stage.directory / "search"
            speed = speed_of(recipe.speed, target_device, self.run_on, grid, base, scores, budget, folder)
            evaluator = QualityEvaluator(model, calibration)
            return (
                scores,
                evaluator,
                evaluate_candidates(stage, grid, budget, speed, model, scores, evaluator),
            )

    def recover(self, pruned: Path) -> dict[str, Path]:
        """Distill the pruned model, then run the recipe's further stages; the checkpoint of each step by its
        name."""
        recipe, stage = self.recipe, self.stage
        last = self.distill(recipe.distill, pruned, stage.directory / "distilled")
        stage.record["tokens"] = read_record(last)["tokens"]
        if not recipe.post_training:
            return {"distilled": last}
        folder = stage.directory / FOLDER
        made = run_post_training(
            recipe.post_training, last, self.model, self.data, self.pretraining, folder, self.run_on
        )
        found = outcomes(recipe.post_training, made)
        stage.record["tokens"] += sum(one["tokens"] for one in found)
        stage.measure(post_training=found)
        return {"distilled": last, **made}

    def measure(
        self,
        base: HybridConfig,
        budget: Budget,
        found: Search,
        steps: dict[str, Path],
        last: Path,
        result: Path,
        evaluator: QualityEvaluator,
    ) -> None:
        """Evaluate the checkpoint of every step, and record everything in `lineage.json`."""
        recipe, stage = self.recipe, self.stage
        qualities: dict[str, CandidateQuality] = {PARENT: evaluator.base}
        for name, path in list(steps.items())[1:]:
            with self.opened(path) as model:
                qualities[name] = evaluator(model)
        models = {PARENT: self.model, "result": result}
        stage.measure(
            losses={name: quality.loss for name, quality in qualities.items()},
            agreement={name: quality.agreement for name, quality in qualities.items()},
            inference=measure_inference(models, budget, self.run_on),
            accuracy=measure_accuracy(
                recipe.problems, recipe.tasks, recipe.distill.seed, steps, stage, self.run_on
            ),
            **({} if recipe.quantize is None else {QUANTIZED: read_record(result)["measures"]}),
            **export_gguf(recipe, last, steps, stage.directory),
            **sizes(PARENT, base),
            **sizes("pruned", found.selected.config),
        )

    @contextmanager
    def opened(self, path: Path) -> Iterator[HybridLM | StreamedModel]:
        """A checkpoint to measure: in memory in fp32, or streamed. A quantized one is always in memory."""
        with CheckpointReader(path) as reader:
            if self.stage.measures["streamed"] and reader.format is None:
                yield StreamedModel(reader, device=self.run_on)
                return
        yield load(path, torch.float32, self.run_on).eval()

    def prune(self, candidate: Candidate, out: Path) -> Path:
        """A candidate's checkpoint."""
        recipe = PruneRecipe(
            candidate.target,
            self.recipe.scale_by_outgoing_norm,
            self.recipe.num_calibration_samples,
            self.recipe.max_calibration_length,
        )
        return prune(recipe, self.model, out, importance=self.stage.directory / "importance" / FILE)

    def distill(self, recipe: DistillRecipe, student: Path, out: Path) -> Path:
        """A student's checkpoint after distillation from the base model."""
        return distill(recipe, student, self.model, self.data, out, self.pretraining, self.run_on)

    def short_distillation(self, candidate: Candidate, start: Path | None, out: Path, tokens: int) -> float:
        """Distill a candidate on `tokens` tokens; returns its divergence from the base model in nats a
        token."""
        start = start or self.prune(candidate, out.with_name(out.name + "-cut"))
        recipe = dataclasses.replace(self.recipe.distill, tokens=tokens)
        return float(read_record(self.distill(recipe, start, out))["measures"]["kl_after"])


def link_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Give `directory` the files of a checkpoint: by hard links where the file system has them, else as
    copies."""
    for file in sorted(checkpoint.iterdir()):
        if not file.is_file() or file.name in STAGE_FILES:
            continue
        target = directory / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
