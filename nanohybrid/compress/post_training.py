"""The short stages of alignment after distillation, in the recipe's order (paper, section 4).

    aligned/1-grpo, aligned/2-distill, aligned/3-merge, ...      each starts from the one before

A stage is what the command of its name makes of the same recipe and model. The paper's reasoning model learns by DPO and GRPO, then from
its parent once more, which mends what reinforcement cost, then by RLHF, and is the middle of the last two.
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
from nanohybrid.distill.stage import DistillRecipe, distill
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.prune.selection import copy_mask
from nanohybrid.stages.output import read_record
from nanohybrid.text import ChatTemplate, Tokenizer

FOLDER = "aligned"


@dataclass(frozen=True)
class AfterRecipe:
    """One stage after distillation: exactly one of these."""

    sft: SftRecipe | None = None
    """Chats made anew; its share of text is read from the pretraining documents."""
    grpo: GrpoRecipe | None = None
    """Verifiable rewards on its own completions."""
    distill: DistillRecipe | None = None
    """The parent once more, on the same documents."""
    merge: MergeRecipe | None = None
    """The model before the last stage with the one after it, whose share is `weight`."""

    def __post_init__(self) -> None:
        named = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ConfigError(
                f"an entry of after names {found}: it must be one of {', '.join(field.name for field in fields(self))}"
            )

    @property
    def kind(self) -> str:
        """Which stage it is."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)


def check_after(recipes: Sequence[AfterRecipe], model: Path, pretraining: Path | None) -> None:
    """Raise InputError, before any work, for what these stages would lack: a tokenizer, a template, tasks and their levels, text."""
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
                    f"sft.shares.text of after is {share}, but there is no text: give --pretraining DIR, or set it to 0"
                )
            Corpus.read(pretraining)
    for rewards in grpos:
        for name, level in product(rewards.tasks, rewards.difficulties):
            tasks.get(name).make(random.Random(0), level)


def align(
    recipes: Sequence[AfterRecipe],
    student: Path,
    teacher: Path,
    data: Path,
    pretraining: Path | None,
    out: Path,
    device: str,
) -> dict[str, Path]:
    """Run the stages one after the other from the checkpoint `student`; each one's output by its name, as `2-distill`.

    data, pretraining: as in `distill`; device: where all of them run.
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


def outcomes(recipes: Sequence[AfterRecipe], made: Mapping[str, Path]) -> list[dict[str, Any]]:
    """What is remembered of each stage: name, kind, the tokens that it learned from, and what it measured, or the weight of a merge."""
    found = []
    for recipe, (name, path) in zip(recipes, made.items(), strict=True):
        record = read_record(path)
        measured = {"weight": recipe.merge.weight} if recipe.merge else record["measures"]
        found.append({"name": name, "kind": recipe.kind, "tokens": record["tokens"], **measured})
    return found
