"""The stage `distill`: a pruned model learns its teacher's distribution of every next token (paper, section
4)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nanohybrid.checkpoint import cast_as_stored, load, load_config, refuse_quantized, resolve, save
from nanohybrid.data import Batch
from nanohybrid.distill.hidden_state_loss import HiddenStateLoss
from nanohybrid.distill.loader import DistillLoader, evaluation_batches, mixture
from nanohybrid.distill.losses import kl_loss, loss_rows, mean_kl, top_k_kl_loss
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.teacher import CachedTeacherBatch, Teacher, TeacherCache, open_teacher
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM
from nanohybrid.prune.selection import copy_mask
from nanohybrid.stages import Stage, open_stage, progress
from nanohybrid.train import fit, training_state

TEACHER = "teacher"
"""The folder of a teacher's stored top-k tokens, while the run lasts."""
B = TypeVar("B", Batch, CachedTeacherBatch)


def distill(
    recipe: DistillRecipe,
    student: Path,
    teacher: Path,
    data: Path,
    out: Path,
    pretraining: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Train the checkpoint `student` towards the checkpoint `teacher`. Writes the trained checkpoint to `out`
    and returns it.

    data: documents of post-training: a directory of token stores, or an alignment's output, whose `stores`
    are read. pretraining: token stores to mix in. device: where both models are while the student learns.
    Raises InputError for a quantized student and for models with other vocabularies.
    """
    student, teacher = resolve(student), resolve(teacher)
    refuse_quantized(student)
    check_vocabularies(student, teacher)
    hidden_states = HiddenStateLoss.of(recipe.hidden_state_loss, student, teacher)
    inputs = {"student": student, "teacher": teacher, "data": data} | (
        {"pretraining": pretraining} if pretraining else {}
    )
    with open_stage(out, "distill", recipe, inputs, recipe.seed, device) as stage:
        if stage.complete:
            return out
        stores, weights = mixture(recipe, data, pretraining)
        loader = DistillLoader(recipe, stores, weights)
        model = load(student, torch.float32, device)
        for name, store in stores.items():
            store.check_ids(model.config.vocab_size, f"{data}: {name}")
        held_out = evaluation_batches(recipe, data, loader)
        train(recipe, stage, model, student, teacher, loader, held_out, hidden_states)
        stage.measure(final_loss=stage.series("distill")[-1]["loss"], epochs=loader.last.epochs(recipe.steps))
        cast_as_stored(model, student)
        save(model, stage.directory, assets=student)
        copy_mask(student, stage.directory)  # which entries of the base model these are has not changed
        training_state.remove(stage.directory)
        shutil.rmtree(stage.directory / TEACHER, ignore_errors=True)
    return out


def train(
    recipe: DistillRecipe,
    stage: Stage,
    model: HybridLM,
    student: Path,
    teacher: Path,
    loader: DistillLoader,
    held_out: list[Batch],
    hidden_states: HiddenStateLoss | None = None,
) -> None:
    """Train the student in place, and measure its divergence from the teacher before and after.

    student: where it came from. It is measured afterwards in the dtypes that it has there and is saved in.
    """

    def measure(when: str, teacher: Teacher) -> None:
        if f"kl_{when}" in stage.measures:
            return
        if when == "after":
            cast_as_stored(model, student)
            model.float()
        found = {f"kl_{when}": mean_kl(model, teacher, held_out, recipe.train_on_prompt)}
        if hidden_states is not None:
            found[f"hidden_state_loss_{when}"] = hidden_states.mean(model, teacher, held_out)
        stage.measure(**found)

    def run(batches: Callable[[int], B], loss: Callable[[HybridLM, B], tuple[Tensor, int]]) -> None:
        fit(model, batches, loss, recipe, steps=recipe.steps, stage=stage, name="distill")

    with open_teacher(teacher, recipe.teacher, model.device) as opened:
        measure("before", opened)
        if not recipe.top_k:
            run(loader.batch, kl_loss(opened, recipe.temperature, recipe.train_on_prompt, hidden_states))
            measure("after", opened)
            return
        rows = partial(loss_rows, train_on_prompt=recipe.train_on_prompt)
        cache = TeacherCache(stage.directory / TEACHER, recipe.top_k, recipe.temperature)
        with progress("teacher", recipe.steps * recipe.batch_tokens, "tok") as bar:
            for tokens in cache.fill(opened, loader.batch, rows, range(recipe.steps)):
                bar.advance(tokens)
    del opened  # while the student learns, nothing of the teacher is in memory

    def cached(step: int) -> CachedTeacherBatch:
        batch = loader.batch(step)
        return cache.batch(batch, rows(batch), step)

    run(cached, partial(top_k_kl_loss, temperature=recipe.temperature))
    with open_teacher(teacher, recipe.teacher, model.device) as opened:
        measure("after", opened)


def check_vocabularies(student: Path, teacher: Path) -> None:
    """Raise InputError where the two models have vocabularies of different sizes."""
    sizes = [load_config(path).vocab_size for path in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{student} has a vocabulary of {sizes[0]}, its teacher {teacher} of {sizes[1]}: they "
            "must share it"
        )
