"""How good a pruned model is before and after it learns: its loss on documents, and how often its next token is the parent's.

A model in memory reads batch after batch. One that is read layer by layer takes as many documents along as may be held, and its head
comes in pieces of the vocabulary.

T tokens · E embedding · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.data import Batch
from nanohybrid.data.packing import IGNORED
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_importance import HELD
from nanohybrid.prune.layerwise import Parts

Read = tuple[Tensor, Tensor]
ROWS = 1024  # tokens whose logits are held at once


@dataclass(frozen=True)
class Quality:
    """Mean cross-entropy of a target token, in nats; the share of targets at which the likeliest token is the parent's."""

    loss: float
    agreement: float


class Judge:
    """Compares models with their parent on the target tokens of a calibration set; the parent is run once."""

    def __init__(self, parent: HybridLM | Parts, calibration: Calibration, held_bytes: int = HELD) -> None:
        self.batches, self.held_bytes = (
            [batch.to(parent.device) for batch in calibration.batches()],
            held_bytes,
        )
        if not any(batch.target_count for batch in self.batches):
            raise InputError(
                "the calibration documents hold no token to learn: give documents whose tokens are targets"
            )
        found = self._read(parent)
        self.likeliest = [likeliest_T for _, likeliest_T in found]
        self.parent = Quality(_mean(found), 1.0)

    def __call__(self, model: HybridLM | Parts) -> Quality:
        """The quality of a model of the same vocabulary."""
        found = self._read(model)
        pairs = zip(found, self.likeliest, strict=True)
        same = sum(int((likeliest_T == parents_T).sum()) for (_, likeliest_T), parents_T in pairs)
        return Quality(_mean(found), same / sum(len(likeliest_T) for likeliest_T in self.likeliest))

    def _read(self, model: HybridLM | Parts) -> list[Read]:
        if isinstance(model, HybridLM):
            return [_read(model, batch) for batch in self.batches]
        most = max(1, self.held_bytes // (4 * model.config.hidden_size))
        return [found for group in groups(self.batches, most) for found in _read_streamed(model, group)]


def groups(batches: list[Batch], tokens: int) -> Iterator[list[Batch]]:
    """The batches in order, at most `tokens` tokens together, but one of them at least."""
    group: list[Batch] = []
    for batch in batches:
        if group and sum(other.layout.tokens for other in group) + batch.layout.tokens > tokens:
            yield group
            group = []
        group.append(batch)
    yield group


@torch.inference_mode()
def _read_streamed(parts: Parts, batches: list[Batch]) -> list[Read]:
    """Of each target of each batch: its loss, and the likeliest token there; a layer, and a piece of the head, at a time."""
    hidden = parts.embedded([batch.tokens_T for batch in batches])
    for block in parts.blocks():
        for place, batch in enumerate(batches):
            hidden[place] = block(hidden[place], batch.layout, None)
    norm, rows = parts.final_norm(), [batch.targets_T != IGNORED for batch in batches]
    read = [
        Scores.of(norm(h_TE)[rows_T], batch.targets_T[rows_T])
        for h_TE, rows_T, batch in zip(hidden, rows, batches, strict=True)
    ]
    hidden.clear()
    begin = 0
    for piece_VE in parts.head_pieces():
        for scores in read:
            scores.add(piece_VE, begin)
        begin += len(piece_VE)
    return [(scores.lse_T - scores.target_T, scores.likeliest_T) for scores in read]


@dataclass
class Scores:
    """Running results over pieces of the vocabulary: log of the summed exponentials, the target's logit, the greatest and where it is."""

    h_TE: Tensor
    targets_T: Tensor
    lse_T: Tensor
    target_T: Tensor
    most_T: Tensor
    likeliest_T: Tensor

    @classmethod
    def of(cls, h_TE: Tensor, targets_T: Tensor) -> Scores:
        """Before the first piece."""
        least_T = torch.full(targets_T.shape, -math.inf, dtype=torch.float64, device=h_TE.device)
        return cls(
            h_TE, targets_T, least_T, torch.zeros_like(least_T), least_T.clone(), torch.zeros_like(targets_T)
        )

    def add(self, piece_VE: Tensor, begin: int) -> None:
        """Take the tokens from `begin` on."""
        for start in range(0, len(self.targets_T), ROWS):
            part = slice(start, start + ROWS)
            logits_TV = (self.h_TE[part] @ piece_VE.T).double()
            most_T, index_T = logits_TV.max(dim=1)
            higher_T = most_T > self.most_T[part]
            self.likeliest_T[part] = torch.where(higher_T, begin + index_T, self.likeliest_T[part])
            self.most_T[part] = torch.where(higher_T, most_T, self.most_T[part])
            self.lse_T[part] = torch.logaddexp(self.lse_T[part], logits_TV.logsumexp(dim=1))
            here_T = self.targets_T[part] - begin
            inside_T = (here_T >= 0) & (here_T < len(piece_VE))
            found_T = logits_TV.gather(1, here_T.clamp(0, len(piece_VE) - 1)[:, None]).squeeze(1)
            self.target_T[part] += torch.where(inside_T, found_T, torch.zeros_like(found_T))


@torch.inference_mode()
def _read(model: HybridLM, batch: Batch) -> Read:
    """Of each target of a batch: its loss, and the likeliest token there."""
    rows_T = batch.targets_T != IGNORED
    hidden_TE, targets_T = model.hidden(batch.tokens_T, batch.layout)[rows_T], batch.targets_T[rows_T]
    losses, likeliest = [], []
    for part_TE, target_T in zip(hidden_TE.split(ROWS), targets_T.split(ROWS), strict=True):
        logits_TV = (part_TE @ model.head_weight.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="none").double())
        likeliest.append(logits_TV.argmax(dim=-1))
    return torch.cat(losses) if losses else hidden_TE.new_zeros(0), torch.cat(
        likeliest
    ) if likeliest else targets_T


def _mean(found: list[Read]) -> float:
    return float(torch.cat([loss_T for loss_T, _ in found]).mean())
