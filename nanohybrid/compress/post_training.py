"""Post-training after distillation: short stages of alignment in the recipe's order (paper, section 4).

    aligned/1-grpo, aligned/2-distill, aligned/3-merge, ...      each starts from the one before

Each stage is the same as the command of its name with the same recipe and model. The paper's reasoning model
is trained by DPO and GRPO, then distilled again from the teacher to recover what RL degraded, then trained by
RLHF. The final model is the average of the last two checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from nanohybrid import tasks
from nanohybrid.align import GrpoRecipe, MergeRecipe, SftRecipe, grpo, merge, sft
from nanohybrid.data.corpus import Corpus
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.prune.selection import copy_mask
from nanohybrid.stages.output import read_record
from nanohybrid.text import ChatTemplate, Tokenizer

FOLDER = "aligned"


@dataclass(frozen=True)
class PostTrainingRecipe:
    """One stage after distillation: exactly one of these fields is set. Raises ConfigError otherwise."""

    sft: SftRecipe | None = None
    """Newly generated chats; its share of text is read from the pretraining documents."""
    grpo: GrpoRecipe | None = None
    """GRPO with verifiable rewards."""
    distill: DistillRecipe | None = None
    """Distillation from the teacher again, on the same documents."""
    merge: MergeRecipe | None = None
    """The average of the model before the last stage and the one after it, whose share is `weight`."""

    def __post_init__(self) -> None:
        named = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ConfigError(
                f"an entry of post_training names {found}: it must be one of "
                f"{', '.join(field.name for field in fields(self))}"
            )

    @property
    def kind(self) -> str:
        """Which stage it is."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)


def check_post_training(recipes: Sequence[PostTrainingRecipe], model: Path, pretraining: Path | None) -> None:
    """Raise InputError, before any work, where these stages lack a tokenizer, a template, a task or its
    level, or text."""
    sfts, grpos = [one.sft for one in recipes if one.sft], [one.grpo for one in recipes if one.grpo]
    if sfts or grpos:
        Tokenizer.from_directory(model)
        ChatTemplate.from_directory(model)
    for chats in sfts:
        for name in chats.tasks:
            tasks.get(name)
        if chats.shares.text > 0:
            if pretraining is None:
                share = chats.shares.text
                raise InputError(
                    f"sft.shares.text of post_training is {share}, but there is no text: give "
                    "--pretraining DIR, or set it to 0"
                )
            Corpus.read(pretraining)
    for rewards in grpos:
        for name, level in product(rewards.tasks, rewards.difficulties):
            tasks.get(name).make(random.Random(0), level)


def run_post_training(
    recipes: Sequence[PostTrainingRecipe],
    student: Path,
    teacher: Path,
    data: Path,
    pretraining: Path | None,
    out: Path,
    device: str,
) -> dict[str, Path]:
    """Run the stages one after the other from the checkpoint `student`. Returns each one's output by its
    name, as `2-distill`.

    teacher, data, pretraining: as in `distill`. device: where all of them run.
    """
    made: dict[str, Path] = {}
    before, last = student, student
    for number, recipe in enumerate(recipes, 1):
        name = f"{number}-{recipe.kind}"
        folder = out / name
        if recipe.sft is not None:
            sft(recipe.sft, last, folder, pretraining, device)
        elif recipe.grpo is not None:
            grpo(recipe.grpo, last, folder, device)
        elif recipe.distill is not None:
            distill(recipe.distill, last, teacher, data, folder, pretraining, device)
        elif recipe.merge is not None:
            merge(recipe.merge, before, last, folder)
        copy_mask(student, folder)  # no stage changes which entries these are, and a later one may ask
        before, last, made[name] = last, folder, folder
    return made


def outcomes(recipes: Sequence[PostTrainingRecipe], made: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The record of each stage: its name, kind, tokens, and what it measured, or the weight of a merge."""
    found = []
    for recipe, (name, path) in zip(recipes, made.items(), strict=True):
        record = read_record(path)
        measured = {"weight": recipe.merge.weight} if recipe.merge else record["measures"]
        found.append({"name": name, "kind": recipe.kind, "tokens": record["tokens"], **measured})
    return found
