"""Hidden-state distillation: an optional loss on the hidden states between layers; off in the paper.

    loss = KL(teacher || student) + weight x mean over the chosen layers of d(s, t)        for each token

    mse      |s - t|^2 / |t|^2, so that deep layers, whose hidden states are long, have no more weight
    cosine   1 - cos(s, t)

s is the output of a layer of the student, t the output of the same layer of the teacher in the channels that
the student has. `pruning_mask.json`, which pruning wrote, says which layer and which channels these are. The
projection between two widths is then a selection of channels without parameters, and a student that was not
pruned is at distance 0.

T tokens · E hidden size of the student.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load_config
from nanohybrid.data import Batch
from nanohybrid.distill.teacher import OffloadedTeacher, Teacher
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.model import HybridLM
from nanohybrid.prune.layerwise import LayerwiseModel, LoadedModel
from nanohybrid.prune.selection import FILE, Selection, file_in

MSE, COSINE = "mse", "cosine"


@dataclass(frozen=True)
class HiddenStateLossRecipe:
    """How much hidden states count beside the logits."""

    weight: float = 0.0
    """Of the distance of hidden states, beside 1 for the divergence of the logits. 0: off, as in the
    paper."""
    layers: tuple[int, ...] = ()
    """Layers, in the teacher's numbering from 0, whose outputs are compared. Empty: all that the student
    has."""
    kind: str = MSE
    """mse (squared distance over the teacher's squared length) or cosine (1 minus the cosine)."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(
                f"hidden_state_loss: weight is {self.weight}: give 0 for no loss on hidden states, "
                "or a positive number"
            )
        if self.kind not in (MSE, COSINE):
            raise ConfigError(f"hidden_state_loss: kind is {self.kind!r}: known are {MSE} and {COSINE}")


@dataclass(frozen=True)
class HiddenStateLoss:
    """What is compared. layers: the teacher's layer -> the student's. channels: the teacher's channels that
    the student has."""

    recipe: HiddenStateLossRecipe
    layers: Mapping[int, int]
    channels: tuple[int, ...]

    @classmethod
    def of(cls, recipe: HiddenStateLossRecipe, student: Path, teacher: Path) -> HiddenStateLoss | None:
        """For two checkpoints; None where the recipe has no such loss.

        Raises InputError where a named layer does not exist, or the student's pruning mask does not.
        """
        if not recipe.weight:
            return None
        selection = selection_of(student, teacher)
        place = {theirs: mine for mine, theirs in enumerate(selection.layers)}
        count = load_config(teacher).num_hidden_layers
        for layer in recipe.layers:
            if layer not in place:
                exists = 0 <= layer < count
                why = "the student does not have it" if exists else f"the teacher has layers 0 to {count - 1}"
                nearest = min(selection.layers, key=lambda other: abs(other - layer))
                raise InputError(f"hidden_state_loss.layers names {layer}: {why}; nearest {nearest}")
        chosen = recipe.layers or selection.layers
        return cls(recipe, {layer: place[layer] for layer in chosen}, selection.hidden)

    def run(self, student: HybridLM, teacher: Teacher, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both models' final hidden states, and [T]: the mean distance over the layers. Only the student's
        have a gradient."""
        with torch.no_grad():
            layerwise: LayerwiseModel
            if isinstance(teacher, OffloadedTeacher):
                layerwise = teacher.model
            else:
                assert isinstance(teacher, HybridLM)
                layerwise = LoadedModel(teacher)
            teacher_TE, theirs = forward(layerwise, batch, self.layers)
        student_TE, mine = forward(LoadedModel(student), batch, self.layers.values())
        channels_E = torch.tensor(self.channels, device=teacher_TE.device)
        distances = [
            distance(mine[here], theirs[there].index_select(1, channels_E), self.recipe.kind)
            for there, here in self.layers.items()
        ]
        return student_TE, teacher_TE, torch.stack(distances).mean(0)

    @torch.no_grad()
    def mean(self, student: HybridLM, teacher: Teacher, batches: list[Batch]) -> float:
        """The mean distance over all tokens of some batches."""
        distances = [self.run(student, teacher, batch.to(student.device))[2].double() for batch in batches]
        return float(torch.cat(distances).mean())


def selection_of(student: Path, teacher: Path) -> Selection:
    """What of the teacher the student has. Raises InputError where that is not known, or is not of these
    two."""
    mine, theirs = load_config(student), load_config(teacher)
    file = file_in(student)
    if file is None:
        if mine != theirs:
            raise InputError(
                f"{student}: holds no {FILE} to say which of {teacher}'s channels it has; set "
                "hidden_state_loss.weight to 0"
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


def forward(model: LayerwiseModel, batch: Batch, layers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Final hidden states [T, E], and the output [T, E] of each of the given layers."""
    (h_TE,) = model.embedded([batch.tokens_T])
    found: dict[int, Tensor] = {}
    for index, block in enumerate(model.blocks()):
        h_TE = block(h_TE, batch.layout, None)
        if index in layers:
            found[index] = h_TE
    return model.final_norm()(h_TE), found


def distance(s_TE: Tensor, t_TE: Tensor, kind: str) -> Tensor:
    """[T] in fp32: the distance of each token's hidden states."""
    s_TE, t_TE = s_TE.float(), t_TE.float()
    if kind == COSINE:
        return 1 - torch.cosine_similarity(s_TE, t_TE, dim=1)
    return (s_TE - t_TE).square().sum(1) / t_TE.square().sum(1).clamp(min=1e-12)
