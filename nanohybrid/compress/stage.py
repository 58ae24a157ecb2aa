"""The stage `compress`: importance -> search -> race -> prune -> distill (-> align, -> quantize), each in a directory of its own.

    importance/   scores of every axis and layer             search/     every shape that fits the budget, the choice first
    pruned/       the chosen shape, and kept.json            distilled/  the same after learning from the parent
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
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanohybrid.checkpoint import CheckpointReader, load, load_config, refuse_quantized
from nanohybrid.compress.candidate_quality import Judge
from nanohybrid.compress.default_calibration import documents_for
from nanohybrid.compress.finish import check_ends, export_gguf, quantized
from nanohybrid.compress.inference_cost import at_work
from nanohybrid.compress.plan import grid_of
from nanohybrid.compress.post_training import FOLDER, AfterRecipe, align, outcomes
from nanohybrid.compress.report import compression_report
from nanohybrid.compress.search import Candidate, Grid
from nanohybrid.compress.select_candidate import MEASURED, ROOFLINE, decide, speed_of, try_shapes
from nanohybrid.compress.successive_halving import RaceRecipe
from nanohybrid.config import HybridConfig
from nanohybrid.data import TokenStore
from nanohybrid.distill.stage import DistillRecipe, distill
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import DTYPES, QUANTIZED, STEP, Budget
from nanohybrid.estimate.devices import device
from nanohybrid.evaluate.accuracy import check_problem_settings, measure_accuracy
from nanohybrid.export import TYPES
from nanohybrid.extras import require
from nanohybrid.files import atomic_write
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.importance import FILE
from nanohybrid.prune.layerwise import Stored
from nanohybrid.prune.measure import COSINE, ITERATIVE, ONE_SHOT, importance_of
from nanohybrid.prune.stage import PruneRecipe, prune, sizes
from nanohybrid.prune.streaming import streams
from nanohybrid.stages import Stage, open_stage
from nanohybrid.stages.output import read_record
from nanohybrid.tasks import DEFAULT_MIX

STAGE_FILES = ("recipe.toml", "lineage.json", "report.html")


@dataclass(frozen=True)
class CompressRecipe:
    """How to make a model smaller."""

    budget_bytes: int | None = None
    """Memory for the model at work: weights, keys and values, states, and the activations of a step."""
    device: str | None = None
    """Whose memory is the budget where no bytes are given: a10g, l4, rtx4090, h100, h200 or cpu; and whose speed is estimated."""
    beside_bytes: int = 0
    """What else must fit on that device."""
    budget_share: float = 0.72
    """Where neither bytes nor a device are given: share of what the parent takes in `dtype`, activations aside."""
    context: int = 4096
    """Tokens of a sequence for which the budget must suffice."""
    batch: int = 1
    """Sequences at once."""
    dtype: str = "bf16"
    """Of the weights, keys and values at work: bf16, fp16 or fp32."""
    quantize: str | None = None
    """int8, int4 or fp8: what the matrices become at last. The budget is then for that form, and what is not a matrix stays bf16."""
    gguf: str | None = None
    """Also write the result as one file for llama.cpp: bf16, f16, f32, q8_0 or q4_0."""
    samples: int = 256
    """Calibration documents."""
    length: int = 512
    """Tokens of each, at most."""
    outgoing: bool = True
    """Multiply activations by the norm of the weights that read them."""
    layers_by: str = ITERATIVE
    """How layers are ranked where some may go: iterative (the paper's), one-shot, or cosine."""
    stream: bool | None = None
    """Read the models layer by layer to score and to try them, one layer in memory; none said: where they have no room whole."""
    speed: str = ROOFLINE
    """How tokens a second are known: roofline (of `device`, else of a CPU), or measured (layers timed on the device that is here)."""
    near: float = 0.01
    """Of the shapes whose quality is within this share of the best's, the fastest is chosen."""
    problems: int = 0
    """Held-out problems of each family that the model answers after every step; 0: it is asked none."""
    tasks: tuple[str, ...] = DEFAULT_MIX
    """Families of these problems."""
    grid: Grid = field(default_factory=Grid)
    race: RaceRecipe = field(default_factory=RaceRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    after: tuple[AfterRecipe, ...] = ()
    """Stages after distillation, each an sft, grpo, distill or merge, as [[after]] and [after.grpo] in TOML; none as it comes."""

    def __post_init__(self) -> None:
        if not 0 < self.budget_share <= 1:
            raise ConfigError(
                f"budget_share is {self.budget_share}: a share of the parent is above 0 and at most 1"
            )
        if self.dtype not in DTYPES:
            also = (
                f"; for {self.dtype} matrices give --quantize {self.dtype}" if self.dtype in QUANTIZED else ""
            )
            raise ConfigError(f"dtype is {self.dtype!r}: known are {', '.join(DTYPES)}{also}")
        if self.quantize is not None and (self.quantize not in QUANTIZED or self.dtype != "bf16"):
            raise ConfigError(
                f"quantize is {self.quantize!r} and dtype {self.dtype}: known are {', '.join(QUANTIZED)}, with dtype bf16"
            )
        if self.gguf is not None and self.gguf not in TYPES:
            raise ConfigError(f"gguf is {self.gguf!r}: known are {', '.join(TYPES)}")
        check_problem_settings(self.problems, self.tasks)
        if self.speed not in (ROOFLINE, MEASURED):
            raise ConfigError(f"speed is {self.speed!r}: known are {ROOFLINE} and {MEASURED}")
        if self.layers_by not in (ITERATIVE, ONE_SHOT, COSINE):
            raise ConfigError(
                f"layers_by is {self.layers_by!r}: known are {ITERATIVE}, {ONE_SHOT} and {COSINE}"
            )
        if not self.near >= 0:
            raise ConfigError(f"near is {self.near}: a share of the best quality is 0 or more")
        if self.device is not None and device(self.device).budget(self.beside_bytes) < 1:
            raise ConfigError(f"beside_bytes is {self.beside_bytes}: that leaves nothing of {self.device}")
        if self.after and self.after[0].kind == "merge":
            raise ConfigError(
                "after begins with merge, which joins the last two models: there must be a stage before it"
            )
        Budget(1 if self.budget_bytes is None else self.budget_bytes, self.context, self.batch, self.dtype)

    @property
    def form(self) -> str:
        """What the result's matrices are in: a format, else the dtype."""
        return self.quantize or self.dtype

    def budget(self, parent: HybridConfig) -> Budget:
        """The budget in bytes."""
        if self.budget_bytes is not None:
            return Budget(self.budget_bytes, self.context, self.batch, self.form, STEP)
        if self.device is not None:
            return Budget(
                device(self.device).budget(self.beside_bytes), self.context, self.batch, self.form, STEP
            )
        total = Footprint.of(parent, DTYPES[self.dtype]).total(self.context, self.batch)
        return Budget(int(total * self.budget_share), self.context, self.batch, self.form)

    def grid_for(self, parent: HybridConfig) -> Grid:
        """The recipe's grid; where it was left as it comes, the paper's for the paper's parent."""
        return grid_of(parent, self.grid) if self.grid == Grid() else self.grid


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
        atomic_write(
            stage.directory / "kept.json", (pruned / "kept.json").read_bytes()
        )  # a file of its own: what lies there may be a link
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
