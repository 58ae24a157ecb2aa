"""Distillation: a pruned model learns its parent's distribution of every next token (paper, section 4).

    minimise  mean over tokens of KL(teacher || student) at temperature tau

from the logits alone, in chunks that never hold [tokens, vocabulary]. The documents are those of post-training, mixed 70 to 30 with
those of pretraining, as the paper found best for a model that reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load, read_config, refuse_quantized, save
from nanohybrid.compress.calibration import VALIDATION, store_paths
from nanohybrid.data import Batch, Loader, TokenStore
from nanohybrid.data.packing import IGNORED
from nanohybrid.data.store import STORES
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import chunked_forward_kl, summed_forward_kl
from nanohybrid.stages import open_stage
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig, fit, snapshot

POST, PRE = "post", "pre"


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
        if self.temperature <= 0 or not 0 < self.post_training <= 1:
            raise ConfigError("temperature must be above 0, and post_training is a share above 0 and at most 1")

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return -(-self.tokens // self.batch_tokens)


def distill(recipe: DistillRecipe, student: Path, teacher: Path, data: Path, out: Path, pretraining: Path | None = None) -> Path:
    """Train the checkpoint `student` towards `teacher` on the token stores of `data`, mixed with those of `pretraining`.

    data: a directory of stores, or an alignment's output, whose `stores` are read. Writes the student's checkpoint to `out`.
    """
    refuse_quantized(student)
    check_vocabularies(student, teacher)
    inputs = {"student": student, "teacher": teacher, "data": data} | ({"pretraining": pretraining} if pretraining else {})
    with open_stage(out, "distill", recipe, inputs, recipe.seed) as stage:
        if stage.complete:
            return out
        stores, weights = mixture(recipe, data, pretraining)
        loader = Loader(stores, [(1.0, weights)], recipe.batch_tokens, recipe.sequence_length, recipe.seed, recipe.steps)
        parent = load(teacher, dtype=torch.float32).requires_grad_(False).eval()
        network = load(student, dtype=torch.float32)
        for name, store in stores.items():
            store.check_ids(network.config.vocab_size, f"{data}: {name}")
        held_out = measured_batches(recipe, data, loader)
        if "kl_before" not in stage.measures:
            stage.measure(kl_before=mean_divergence(network, parent, held_out, recipe.every_token))
        fit(
            network,
            loader.batch,
            divergence(parent, recipe.temperature, recipe.every_token),
            recipe,
            steps=recipe.steps,
            stage=stage,
            name="distill",
        )
        stage.measure(kl_after=mean_divergence(network, parent, held_out, recipe.every_token))
        stage.measure(final_loss=stage.series("distill")[-1]["loss"], epochs=loader.epochs(recipe.steps))
        save(network, stage.directory, assets=student)
        snapshot.remove(stage.directory)
    return out


def check_vocabularies(student: Path, teacher: Path) -> None:
    """Raises InputError where the two do not speak of the same tokens."""
    sizes = [read_config(path).vocab_size for path in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{student} has a vocabulary of {sizes[0]}, its teacher {teacher} of {sizes[1]}: they must share it")


def divergence(teacher: HybridLM, temperature: float, every_token: bool) -> Callable[[HybridLM, Batch], tuple[Tensor, int]]:
    """The loss of distillation: the sum of the divergences over a batch, and over how many tokens."""

    def loss(student: HybridLM, batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            teacher_TE = teacher.hidden(batch.tokens_T, batch.layout)
        student_TE = student.hidden(batch.tokens_T, batch.layout)
        mask_T, count = learnt(batch, every_token)
        return summed_forward_kl(student_TE, student.head_weight, teacher_TE, teacher.head_weight, temperature, mask_T), count

    return loss


def learnt(batch: Batch, every_token: bool) -> tuple[Tensor | None, int]:
    """Where a batch is learnt: a mask (None: everywhere) and how many tokens that are."""
    if every_token:
        return None, batch.layout.tokens
    return batch.targets_T != IGNORED, batch.target_count


@torch.no_grad()
def mean_divergence(student: HybridLM, teacher: HybridLM, batches: list[Batch], every_token: bool = False) -> float:
    """KL(teacher || student) of a token, in nats, over some batches."""
    total, count = 0.0, 0
    for batch in batches:
        mask_T, tokens = learnt(batch, every_token)
        hidden = [model.hidden(batch.tokens_T, batch.layout) for model in (student, teacher)]
        total += chunked_forward_kl(hidden[0], student.head_weight, hidden[1], teacher.head_weight, mask_T=mask_T).double().sum().item()
        count += tokens
    return total / max(count, 1)


def mixture(recipe: DistillRecipe, data: Path, pretraining: Path | None) -> tuple[dict[str, TokenStore], dict[str, float]]:
    """The stores by name and their weights: within post-training and within pretraining, each store by its size."""
    groups = {POST: (data, recipe.post_training if pretraining else 1.0)}
    if pretraining is not None and recipe.post_training < 1:
        groups[PRE] = (pretraining, 1 - recipe.post_training)
    stores: dict[str, TokenStore] = {}
    weights: dict[str, float] = {}
    for group, (folder, share) in groups.items():
        found: Mapping[str, TokenStore] = {f"{group}-{path.stem}": TokenStore.read(path) for path in store_paths(folder)}
        total = sum(store.token_count for store in found.values())
        stores |= found
        weights |= {name: share * store.token_count / max(total, 1) for name, store in found.items()}
    return stores, weights


def measured_batches(recipe: DistillRecipe, data: Path, loader: Loader) -> list[Batch]:
    """What the divergence is measured on: held-out documents of `data` where there are any, else batches after the last step."""
    folder = data / STORES if (data / STORES).is_dir() else data
    held_out = {path.stem: TokenStore.read(path) for path in sorted(folder.glob(f"{VALIDATION}*.safetensors"))}
    count = max(1, recipe.measured_tokens // recipe.batch_tokens)
    if not held_out:
        return [loader.batch(recipe.steps + number) for number in range(count)]
    weights = {name: float(store.token_count) for name, store in held_out.items()}
    measured = Loader(held_out, [(1.0, weights)], recipe.batch_tokens, recipe.sequence_length, 0, count)
    return [measured.batch(number) for number in range(count)]
