"""A loss on hidden states between the layers, beside the one on the logits: optional, and off in the paper.

    loss = KL(teacher || student) + weight x mean over the chosen layers of d(student's hidden state, teacher's)     per token

    mse      |s - t|^2 / |t|^2, so that a deep layer, whose hidden states are long, weighs no more than the first
    cosine   1 - cos(s, t)

s is what leaves a layer of the student, t the channels that the student kept of what leaves the same layer of the teacher. Which layer and
which channels these are stands in the `pruning_mask.json` that pruning wrote, so the projection between two
widths is a choice of channels: it has nothing to learn, and a student that was not cut is at distance 0.

T tokens · E embedding, of the student.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load_config
from nanohybrid.data import Batch
from nanohybrid.distill.teacher import Offloaded, Teacher
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.model import HybridLM
from nanohybrid.prune.layerwise import Loaded, Parts
from nanohybrid.prune.selection import FILE, Selection, file_in

MSE, COSINE = "mse", "cosine"


@dataclass(frozen=True)
class BetweenRecipe:
    """How much hidden states count beside the logits."""

    weight: float = 0.0
    """Of the distance of hidden states, beside 1 for the divergence of the logits; 0: none, as in the paper."""
    layers: tuple[int, ...] = ()
    """Layers, in the teacher's numbering from 0, whose outputs are compared; none named: all that the student kept."""
    kind: str = MSE
    """mse (squared distance over the teacher's squared length) or cosine (1 minus the cosine)."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(
                f"between: weight is {self.weight}: give 0 for no loss on hidden states, or a positive number"
            )
        if self.kind not in (MSE, COSINE):
            raise ConfigError(f"between: kind is {self.kind!r}: known are {MSE} and {COSINE}")


@dataclass(frozen=True)
class Between:
    """What is compared: the teacher's layers with the student's, over the teacher's channels that the student has."""

    recipe: BetweenRecipe
    place: Mapping[int, int]
    hidden: tuple[int, ...]

    @classmethod
    def of(cls, recipe: BetweenRecipe, student: Path, teacher: Path) -> Between | None:
        """For two checkpoints; None where the recipe wants no such loss. InputError where it cannot be known what is what."""
        if not recipe.weight:
            return None
        selection = selection_of(student, teacher)
        place = {theirs: mine for mine, theirs in enumerate(selection.layers)}
        count = load_config(teacher).num_hidden_layers
        for layer in recipe.layers:
            if layer not in place:
                why = (
                    "the student does not have it any more"
                    if 0 <= layer < count
                    else f"the teacher has layers 0 to {count - 1}"
                )
                nearest = min(selection.layers, key=lambda other: abs(other - layer))
                raise InputError(f"between.layers names {layer}: {why}; nearest {nearest}")
        return cls(
            recipe, {layer: place[layer] for layer in recipe.layers or selection.layers}, selection.hidden
        )

    def run(self, student: HybridLM, teacher: Teacher, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both models' final hidden states, and [T]: the mean distance over the layers. Only the student's has a gradient."""
        with torch.no_grad():
            parts = teacher.parts if isinstance(teacher, Offloaded) else Loaded(teacher)
            teacher_TE, theirs = forward(parts, batch, self.place)
        student_TE, mine = forward(Loaded(student), batch, self.place.values())
        channels_E = torch.tensor(self.hidden, device=teacher_TE.device)
        apart = [
            distance(mine[here], theirs[there].index_select(1, channels_E), self.recipe.kind)
            for there, here in self.place.items()
        ]
        return student_TE, teacher_TE, torch.stack(apart).mean(0)

    @torch.no_grad()
    def mean(self, student: HybridLM, teacher: Teacher, batches: list[Batch]) -> float:
        """The mean distance of all tokens of some batches."""
        return float(
            torch.cat(
                [self.run(student, teacher, batch.to(student.device))[2].double() for batch in batches]
            ).mean()
        )


def selection_of(student: Path, teacher: Path) -> Selection:
    """What of the teacher the student has. Raises InputError where that is not known, or is not of these two."""
    mine, theirs = load_config(student), load_config(teacher)
    file = file_in(student)
    if file is None:
        if mine != theirs:
            raise InputError(
                f"{student}: holds no {FILE} to say which of {teacher}'s channels it has; without between.weight it can learn"
            )
        return Selection.everything(theirs)
    selection = Selection.read(file)
    try:
        same = selection.config(theirs) == mine
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{file} is not about {teacher}: name the model that it was pruned from as the teacher"
        )
    return selection


def forward(parts: Parts, batch: Batch, wanted: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """[T, E] after the final norm, and what left each of the `wanted` layers."""
    (h_TE,) = parts.embedded([batch.tokens_T])
    found: dict[int, Tensor] = {}
    for index, block in enumerate(parts.blocks()):
        h_TE = block(h_TE, batch.layout, None)
        if index in wanted:
            found[index] = h_TE
    return parts.final_norm()(h_TE), found


def distance(s_TE: Tensor, t_TE: Tensor, kind: str) -> Tensor:
    """[T] in fp32."""
    s_TE, t_TE = s_TE.float(), t_TE.float()
    if kind == COSINE:
        return 1 - torch.cosine_similarity(s_TE, t_TE, dim=1)
    return (s_TE - t_TE).square().sum(1) / t_TE.square().sum(1).clamp(min=1e-12)
