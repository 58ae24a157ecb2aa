"""Distillation: a pruned model learns its parent's distribution of every next token (paper, section 4).

    minimize  mean over tokens of KL(teacher || student) at temperature tau

from the logits alone, in chunks that never hold [tokens, vocabulary]. The documents are those of post-training, mixed 70 to 30 with
those of pretraining, as the paper found best for a model that reasons. By recipe hidden states count too (between.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nanohybrid.checkpoint import load, load_config, refuse_quantized, save
from nanohybrid.data import Batch, Loader, TokenStore
from nanohybrid.data.packing import IGNORED
from nanohybrid.data.store import STORES
from nanohybrid.distill.hidden_state_loss import Between, BetweenRecipe
from nanohybrid.distill.teacher import BESIDE, PLACES, Answers, Taught, Teacher, teaching
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import chunked_forward_kl, summed_forward_kl, summed_top_k_kl
from nanohybrid.prune.calibration import VALIDATION, store_paths
from nanohybrid.prune.selection import copy_mask
from nanohybrid.stages import Stage, open_stage, progress
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig, fit, training_state

POST, PRE, ANSWERS = "post", "pre", "teacher"
B = TypeVar("B", Batch, Taught)


@dataclass(frozen=True)
class Stretch:
    """Up to a share of the steps, sequences of at most a length."""

    until: float
    sequence_length: int


@dataclass(frozen=True)
class DistillRecipe:
    """How a student learns from its teacher."""

    tokens: int = 500_000
    """Tokens to train on."""
    batch_tokens: int = 2048
    sequence_length: int = 512
    temperature: float = 1.0
    """Softens both distributions."""
    post_training: float = 0.7
    """Share of tokens from post-training documents, where pretraining documents are given too."""
    every_token: bool = False
    """Learn from the teacher on every token, and not only where a document has targets."""
    stretches: tuple[Stretch, ...] = ()
    """Sequence lengths in turn, as in the paper (8,192, then 49,152, then 262,144); none: `sequence_length` all the way."""
    teacher: str = BESIDE
    """Where the teacher is: beside the student, as int8, fp8 or int4 there, or offloaded: read layer by layer at every step."""
    top_k: int = 0
    """Ask the teacher first, keep on the disk its so many likeliest tokens and the mass of the rest, and learn from these; 0: all."""
    between: BetweenRecipe = field(default_factory=BetweenRecipe)
    """A loss on the hidden states between the layers beside the one on the logits; none as it comes."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-3))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    measured_tokens: int = 16_384
    """Tokens on which the divergence from the teacher is measured before and after."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_tokens, self.sequence_length, self.measured_tokens) < 1:
            raise ConfigError("tokens, batch_tokens, sequence_length and measured_tokens must be positive")
        if self.teacher not in PLACES:
            raise ConfigError(f"teacher is {self.teacher!r}: known are {', '.join(PLACES)}")
        if self.top_k < 0:
            raise ConfigError(
                f"top_k is {self.top_k}: give the number of tokens to keep, or 0 for the whole distribution"
            )
        if self.top_k and self.between.weight:
            raise ConfigError(
                "top_k keeps the teacher's likeliest tokens and not its hidden states: give top_k or between.weight, not both"
            )
        ends = [stretch.until for stretch in self.stretches]
        if ends and (ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1.0):
            raise ConfigError(f"stretches end at {ends}: give rising shares of the steps, the last 1.0")
        if self.temperature <= 0 or not 0 < self.post_training <= 1:
            raise ConfigError(
                "temperature must be above 0, and post_training is a share above 0 and at most 1"
            )

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return -(-self.tokens // self.batch_tokens)


def distill(
    recipe: DistillRecipe,
    student: Path,
    teacher: Path,
    data: Path,
    out: Path,
    pretraining: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Train the checkpoint `student` towards `teacher` on the token stores of `data`, mixed with those of `pretraining`.

    data: a directory of stores, or an alignment's output, whose `stores` are read. Writes the student's checkpoint to `out`. device: where
    both are while one learns.
    """
    refuse_quantized(student)
    check_vocabularies(student, teacher)
    between = Between.of(recipe.between, student, teacher)
    inputs = {"student": student, "teacher": teacher, "data": data} | (
        {"pretraining": pretraining} if pretraining else {}
    )
    with open_stage(out, "distill", recipe, inputs, recipe.seed, device) as stage:
        if stage.complete:
            return out
        stores, weights = mixture(recipe, data, pretraining)
        loader = Lessons(recipe, stores, weights)
        network = load(student, torch.float32, device)
        for name, store in stores.items():
            store.check_ids(network.config.vocab_size, f"{data}: {name}")
        learn(recipe, stage, network, teacher, loader, measured_batches(recipe, data, loader), between)
        stage.measure(final_loss=stage.series("distill")[-1]["loss"], epochs=loader.last.epochs(recipe.steps))
        save(network, stage.directory, assets=student)
        copy_mask(student, stage.directory)  # which entries of the base model these are has not changed
        training_state.remove(stage.directory)
        shutil.rmtree(stage.directory / ANSWERS, ignore_errors=True)
    return out


def learn(
    recipe: DistillRecipe,
    stage: Stage,
    network: HybridLM,
    teacher: Path,
    loader: Lessons,
    held_out: list[Batch],
    between: Between | None = None,
) -> None:
    """Train the student, and measure its divergence from the teacher before and after."""

    def measure(name: str, parent: Teacher) -> None:
        if name not in stage.measures:
            apart = (
                {}
                if between is None
                else {name.replace("kl", "apart"): between.mean(network, parent, held_out)}
            )
            stage.measure(**{name: mean_divergence(network, parent, held_out, recipe.every_token)}, **apart)

    def train(batches: Callable[[int], B], loss: Callable[[HybridLM, B], tuple[Tensor, int]]) -> None:
        fit(network, batches, loss, recipe, steps=recipe.steps, stage=stage, name="distill")

    with teaching(teacher, recipe.teacher, network.device) as parent:
        measure("kl_before", parent)
        if not recipe.top_k:
            train(loader.batch, divergence(parent, recipe.temperature, recipe.every_token, between))
            measure("kl_after", parent)
            return
        answers = Answers(stage.directory / ANSWERS, recipe.top_k, recipe.temperature)
        with progress("teacher", recipe.steps * recipe.batch_tokens, "tok") as bar:
            for tokens in answers.ask(
                parent,
                loader.batch,
                partial(rows_learned, every_token=recipe.every_token),
                range(recipe.steps),
            ):
                bar.advance(tokens)
    del parent  # while the student learns, nothing of the teacher is in memory

    def taught(step: int) -> Taught:
        batch = loader.batch(step)
        return answers.batch(batch, rows_learned(batch, recipe.every_token), step)

    train(taught, partial(answered, temperature=recipe.temperature))
    with teaching(teacher, recipe.teacher, network.device) as parent:
        measure("kl_after", parent)


class Lessons:
    """Batches by step; the sequence length may change along the way."""

    def __init__(
        self, recipe: DistillRecipe, stores: Mapping[str, TokenStore], weights: Mapping[str, float]
    ) -> None:
        self.steps, self.stretches = recipe.steps, recipe.stretches or (Stretch(1.0, recipe.sequence_length),)
        self.loaders = [
            Loader(
                stores,
                [(1.0, weights)],
                recipe.batch_tokens,
                stretch.sequence_length,
                recipe.seed,
                recipe.steps,
            )
            for stretch in self.stretches
        ]

    def batch(self, step: int) -> Batch:
        """The batch of a step; past the end those of the last stretch go on."""
        index = next((i for i, stretch in enumerate(self.stretches) if step < stretch.until * self.steps), -1)
        return self.loaders[index].batch(step)

    @property
    def last(self) -> Loader:
        return self.loaders[-1]


def check_vocabularies(student: Path, teacher: Path) -> None:
    """Raises InputError where the two do not speak of the same tokens."""
    sizes = [load_config(path).vocab_size for path in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{student} has a vocabulary of {sizes[0]}, its teacher {teacher} of {sizes[1]}: they must share it"
        )


def divergence(
    teacher: Teacher, temperature: float, every_token: bool, between: Between | None = None
) -> Callable[[HybridLM, Batch], tuple[Tensor, int]]:
    """The loss of distillation: the sum of the divergences over a batch, and over how many tokens; with `between` of hidden states too."""

    def logits_alone(student: HybridLM, batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            teacher_TE = teacher.hidden(batch.tokens_T, batch.layout)
        return of_logits(student, batch, student.hidden(batch.tokens_T, batch.layout), teacher_TE)

    def and_hidden_states(student: HybridLM, batch: Batch) -> tuple[Tensor, int]:
        assert between is not None
        student_TE, teacher_TE, apart_T = between.run(student, teacher, batch)
        divergence, count = of_logits(student, batch, student_TE, teacher_TE)
        mask_T, _ = learned(batch, every_token)
        return divergence + between.recipe.weight * (
            apart_T if mask_T is None else apart_T[mask_T]
        ).sum(), count

    def of_logits(
        student: HybridLM, batch: Batch, student_TE: Tensor, teacher_TE: Tensor
    ) -> tuple[Tensor, int]:
        mask_T, count = learned(batch, every_token)
        return summed_forward_kl(
            student_TE, student.head_weight, teacher_TE, teacher.head_weight, temperature, mask_T
        ), count

    return logits_alone if between is None else and_hidden_states


def answered(student: HybridLM, taught: Taught, temperature: float) -> tuple[Tensor, int]:
    """The same loss from a teacher's likeliest tokens."""
    hidden_TE = student.hidden(taught.batch.tokens_T, taught.layout)
    return summed_top_k_kl(hidden_TE, student.head_weight, taught.rows_R, taught.teacher, temperature), len(
        taught.rows_R
    )


def rows_learned(batch: Batch, every_token: bool) -> Tensor:
    """[R]: which tokens of a batch are learned, ascending, where the batch is."""
    mask_T, count = learned(batch, every_token)
    return (
        torch.arange(count, device=batch.tokens_T.device) if mask_T is None else mask_T.nonzero().squeeze(1)
    )


def learned(batch: Batch, every_token: bool) -> tuple[Tensor | None, int]:
    """Where a batch is learned: a mask (None: everywhere) and how many tokens that are."""
    if every_token:
        return None, batch.layout.tokens
    return batch.targets_T != IGNORED, batch.target_count


@torch.no_grad()
def mean_divergence(
    student: HybridLM, teacher: Teacher, batches: list[Batch], every_token: bool = False
) -> float:
    """KL(teacher || student) of a token, in nats, over some batches."""
    total, count = 0.0, 0
    for batch in (batch.to(student.device) for batch in batches):
        mask_T, tokens = learned(batch, every_token)
        hidden = [model.hidden(batch.tokens_T, batch.layout) for model in (student, teacher)]
        total += (
            chunked_forward_kl(hidden[0], student.head_weight, hidden[1], teacher.head_weight, mask_T=mask_T)
            .double()
            .sum()
            .item()
        )
        count += tokens
    return total / max(count, 1)


def mixture(
    recipe: DistillRecipe, data: Path, pretraining: Path | None
) -> tuple[dict[str, TokenStore], dict[str, float]]:
    """The stores by name and their weights: within post-training and within pretraining, each store by its size."""
    groups = {POST: (data, recipe.post_training if pretraining else 1.0)}
    if pretraining is not None and recipe.post_training < 1:
        groups[PRE] = (pretraining, 1 - recipe.post_training)
    stores: dict[str, TokenStore] = {}
    weights: dict[str, float] = {}
    for group, (folder, share) in groups.items():
        found: Mapping[str, TokenStore] = {
            f"{group}-{path.stem}": TokenStore.read(path) for path in store_paths(folder)
        }
        total = sum(store.token_count for store in found.values())
        stores |= found
        weights |= {name: share * store.token_count / max(total, 1) for name, store in found.items()}
    return stores, weights


def measured_batches(recipe: DistillRecipe, data: Path, loader: Lessons) -> list[Batch]:
    """What the divergence is measured on: held-out documents of `data` where there are any, else batches after the last step."""
    folder = data / STORES if (data / STORES).is_dir() else data
    held_out = {
        path.stem: TokenStore.read(path) for path in sorted(folder.glob(f"{VALIDATION}*.safetensors"))
    }
    count = max(1, recipe.measured_tokens // recipe.batch_tokens)
    if not held_out:
        return [loader.batch(recipe.steps + number) for number in range(count)]
    weights = {name: float(store.token_count) for name, store in held_out.items()}
    measured = Loader(held_out, [(1.0, weights)], recipe.batch_tokens, recipe.sequence_length, 0, count)
    return [measured.batch(number) for number in range(count)]
