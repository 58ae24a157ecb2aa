"""The stage `compress`: importance -> search -> race -> prune -> distill (-> align, -> quantize), each in a directory of its own.

    importance/   scores of every axis and layer             search/     every shape that fits the budget, the choice first
    pruned/       the chosen shape, and its pruning mask     distilled/  the same after learning from the parent
    aligned/      that after the recipe's further stages     quantized/  the last of them in 8 or 4 bits, where it is wanted

Where the parent fits as it is, nothing is cut, and nothing has to be mended: there is neither distilled/ nor aligned/ then.
The output itself is the last of them as a checkpoint. Every part is found again after a kill, and none is done twice.
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

from nanohybrid.checkpoint import CheckpointReader, load, load_config, refuse_quantized
from nanohybrid.compress.candidate_quality import Judge
from nanohybrid.compress.default_calibration import documents_for
from nanohybrid.compress.finish import check_ends, export_gguf, quantized
from nanohybrid.compress.inference_cost import at_work
from nanohybrid.compress.post_training import FOLDER, align, outcomes
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.report import compression_report
from nanohybrid.compress.search import Candidate
from nanohybrid.compress.select_candidate import decide, speed_of, try_shapes
from nanohybrid.data import TokenStore
from nanohybrid.distill.stage import DistillRecipe, distill
from nanohybrid.estimate.devices import device
from nanohybrid.evaluate.accuracy import measure_accuracy
from nanohybrid.extras import require
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.importance import FILE
from nanohybrid.prune.layerwise import Stored
from nanohybrid.prune.measure import importance_of
from nanohybrid.prune.selection import copy_mask
from nanohybrid.prune.stage import PruneRecipe, prune, sizes
from nanohybrid.prune.streaming import streams
from nanohybrid.stages import Stage, open_stage
from nanohybrid.stages.output import read_record

STAGE_FILES = ("recipe.toml", "lineage.json", "report.html")


def compress(
    recipe: CompressRecipe,
    model: Path,
    data: Path | None,
    out: Path,
    pretraining: Path | None = None,
    run_on: str = "cpu",
) -> Path:
    """Compress the checkpoint `model` to a budget; `data` holds the documents to calibrate with and to learn from again.

    data: None for the model's own chats, else text that is here anyway (documents.py). data and pretraining otherwise as in `distill`.
    run_on: where all of it is computed, which is this machine's affair; the recipe's `device` is what the result is wanted for.
    """
    require("matplotlib", "train")  # for the report at the end
    refuse_quantized(model)
    check_ends(recipe, model, pretraining, run_on)
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
    """One run of the stage: what it works on."""

    recipe: CompressRecipe
    stage: Stage
    model: Path
    data: Path
    pretraining: Path | None
    run_on: str

    def run(self) -> None:
        """All parts in order, and the page at the end."""
        recipe, stage = self.recipe, self.stage
        if "streamed" not in stage.measures:  # once: a resumed run goes on as it began, to the bit
            stage.measure(streamed=streams(self.model, recipe.stream, self.run_on))
        shape = load_config(self.model)
        budget, grid = recipe.budget(shape), recipe.grid_for(shape)
        calibration = Calibration.read(self.data, self.model, recipe.samples, recipe.length)
        TokenStore.from_documents(calibration.samples).check_ids(shape.vocab_size, self.data)
        folder, most = stage.directory / "importance", max(grid.drop_layers)
        with self.opened(self.model) as parent:
            ranked = parent if isinstance(parent, HybridLM) else self.model
            how = recipe.outgoing, most, recipe.layers_by, stage.measures["streamed"], self.run_on
            scores = importance_of(ranked, calibration, folder, *how)
            wanted = device(recipe.device or "cpu")
            speed = speed_of(
                recipe.speed, wanted, self.run_on, grid, shape, scores, budget, stage.directory / "search"
            )
            judge = Judge(parent, calibration)
            found = try_shapes(stage, grid, budget, speed, parent, scores, judge)
        del parent, ranked  # from here on the distillation holds its own
        found = decide(stage, recipe, found, budget, self.learn)
        pruned = self.prune(found.chosen, stage.directory / "pruned")
        steps, last = {"parent": self.model}, pruned  # which is all of the parent, where nothing was cut
        if found.chosen.config != shape:
            last = self.distill(recipe.distill, pruned, stage.directory / "distilled")
            steps |= {"pruned": pruned, "distilled": last}
            stage.record["tokens"] = read_record(last)["tokens"]
            if recipe.after:
                after = align(
                    recipe.after,
                    last,
                    self.model,
                    self.data,
                    self.pretraining,
                    stage.directory / FOLDER,
                    self.run_on,
                )
                steps, told = steps | after, outcomes(recipe.after, after)
                stage.record["tokens"] += sum(one["tokens"] for one in told)
                stage.measure(after=told)
                last = list(after.values())[-1]
        ends = quantized(recipe, last, stage.directory / "quantized", self.data, self.run_on)
        steps, result = steps | ends, next(iter(ends.values()), last)
        qualities = {"parent": judge.parent}
        for name, path in list(steps.items())[1:]:
            with self.opened(path) as model:
                qualities[name] = judge(model)
        stage.measure(
            losses={name: quality.loss for name, quality in qualities.items()},
            agreement={name: quality.agreement for name, quality in qualities.items()},
            at_work=at_work({"parent": self.model, "result": result}, budget, self.run_on),
            accuracy=measure_accuracy(
                recipe.problems, recipe.tasks, recipe.distill.seed, steps, stage, self.run_on
            ),
            **({} if recipe.quantize is None else {"quantized": read_record(result)["measures"]}),
            **export_gguf(recipe, last, steps, stage.directory),
            **sizes("parent", shape),
            **sizes("pruned", found.chosen.config),
        )
        adopt(result, stage.directory)
        copy_mask(pruned, stage.directory, replace=True)  # adopted files may be links, this is one of its own
        report = compression_report(budget, shape, scores, found, stage.record, stage.directory)
        report.write(stage.directory / "report.html")

    @contextmanager
    def opened(self, path: Path) -> Iterator[HybridLM | Stored]:
        """A checkpoint to measure: in memory in fp32, or to be read layer by layer. Codes of 8 or 4 bits are always in memory."""
        with CheckpointReader(path) as reader:
            if self.stage.measures["streamed"] and reader.format is None:
                yield Stored(reader, device=self.run_on)
                return
        yield load(path, torch.float32, self.run_on).eval()

    def prune(self, candidate: Candidate, out: Path) -> Path:
        """A candidate's checkpoint."""
        recipe = PruneRecipe(candidate.target, self.recipe.outgoing, self.recipe.samples, self.recipe.length)
        return prune(recipe, self.model, out, importance=self.stage.directory / "importance" / FILE)

    def distill(self, recipe: DistillRecipe, student: Path, out: Path) -> Path:
        """A student's checkpoint after learning from the parent."""
        return distill(recipe, student, self.model, self.data, out, self.pretraining, self.run_on)

    def learn(self, candidate: Candidate, start: Path | None, out: Path, tokens: int) -> float:
        """A candidate's divergence from the parent after learning `tokens` from it, in nats a token."""
        start = start or self.prune(candidate, out.with_name(out.name + "-cut"))
        recipe = dataclasses.replace(self.recipe.distill, tokens=tokens)
        return float(read_record(self.distill(recipe, start, out))["measures"]["kl_after"])


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
