"""How good a model is on documents: its loss, and how often its most probable next token is the base model's.

A model in memory reads batch after batch. A streamed one takes through its layers as many documents as fit,
and its head is applied in chunks of the vocabulary.

T target tokens · E hidden size · V vocabulary.
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
from nanohybrid.prune.depth_importance import HIDDEN_BYTES
from nanohybrid.prune.layerwise import LayerwiseModel

LossAndTop1 = tuple[Tensor, Tensor]
"""[T] each, of the targets of a batch: the loss, and the most probable token."""
LOGIT_ROWS = 1024
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class CandidateQuality:
    """loss: mean cross-entropy of a target, in nats. agreement: share of targets at which the top-1 token is
    the base model's."""

    loss: float
    agreement: float


class QualityEvaluator:
    """Compares models with their base model on the targets of a calibration set. The base model is run once.

    hidden_bytes: of hidden states that are held at once for a streamed model. Raises InputError where no
    token is a target.
    """

    def __init__(
        self,
        base: HybridLM | LayerwiseModel,
        calibration: Calibration,
        hidden_bytes: int = HIDDEN_BYTES,
    ) -> None:
        self.batches = [batch.to(base.device) for batch in calibration.batches()]
        self.hidden_bytes = hidden_bytes
        if not any(batch.target_count for batch in self.batches):
            raise InputError(
                "the calibration documents hold no token that is a target: give documents whose "
                "tokens are targets"
            )
        found = self._evaluate(base)
        self.top1 = [top1_T for _, top1_T in found]
        self.base = CandidateQuality(_mean_loss(found), 1.0)

    def __call__(self, model: HybridLM | LayerwiseModel) -> CandidateQuality:
        """The quality of a model with the same vocabulary."""
        found = self._evaluate(model)
        pairs = zip(found, self.top1, strict=True)
        same = sum(int((top1_T == expected_T).sum()) for (_, top1_T), expected_T in pairs)
        return CandidateQuality(_mean_loss(found), same / sum(len(top1_T) for top1_T in self.top1))

    def _evaluate(self, model: HybridLM | LayerwiseModel) -> list[LossAndTop1]:
        if isinstance(model, HybridLM):
            return [_evaluate(model, batch) for batch in self.batches]
        tokens = max(1, self.hidden_bytes // (4 * model.config.hidden_size))
        return [found for group in groups(self.batches, tokens) for found in _evaluate_streamed(model, group)]


def groups(batches: list[Batch], tokens: int) -> Iterator[list[Batch]]:
    """The batches in order, in groups of at most `tokens` tokens, but of one batch at least."""
    group: list[Batch] = []
    for batch in batches:
        if group and sum(other.layout.tokens for other in group) + batch.layout.tokens > tokens:
            yield group
            group = []
        group.append(batch)
    yield group


@torch.inference_mode()
def _evaluate_streamed(model: LayerwiseModel, batches: list[Batch]) -> list[LossAndTop1]:
    """For each batch, with one layer, or one chunk of the head, in memory at a time."""
    hidden = model.embedded([batch.tokens_T for batch in batches])
    for block in model.blocks():
        for place, batch in enumerate(batches):
            hidden[place] = block(hidden[place], batch.layout, None)
    norm, rows = model.final_norm(), [batch.targets_T != IGNORED for batch in batches]
    running = [
        RunningLogits.of(norm(h_TE)[rows_T], batch.targets_T[rows_T])
        for h_TE, rows_T, batch in zip(hidden, rows, batches, strict=True)
    ]
    hidden.clear()
    begin = 0
    for chunk_VE in model.head_chunks():
        for logits in running:
            logits.add(chunk_VE, begin)
        begin += len(chunk_VE)
    return [(logits.lse_T - logits.target_T, logits.top1_T) for logits in running]


@dataclass
class RunningLogits:
    """What is known of the logits after some chunks of the vocabulary.

    lse_T: log of the sum of exponentials. target_T: the target's logit. max_T, top1_T: the largest logit, and
    its token.
    """

    h_TE: Tensor
    targets_T: Tensor
    lse_T: Tensor
    target_T: Tensor
    max_T: Tensor
    top1_T: Tensor

    @classmethod
    def of(cls, h_TE: Tensor, targets_T: Tensor) -> RunningLogits:
        """Before the first chunk."""
        least_T = torch.full(targets_T.shape, -math.inf, dtype=torch.float64, device=h_TE.device)
        return cls(
            h_TE, targets_T, least_T, torch.zeros_like(least_T), least_T.clone(), torch.zeros_like(targets_T)
        )

    def add(self, chunk_VE: Tensor, begin: int) -> None:
        """Add the tokens from `begin` on, with their rows of the head."""
        for start in range(0, len(self.targets_T), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits_TV = (self.h_TE[part] @ chunk_VE.T).double()
            max_T, index_T = logits_TV.max(dim=1)
            higher_T = max_T > self.max_T[part]
            self.top1_T[part] = torch.where(higher_T, begin + index_T, self.top1_T[part])
            self.max_T[part] = torch.where(higher_T, max_T, self.max_T[part])
            self.lse_T[part] = torch.logaddexp(self.lse_T[part], logits_TV.logsumexp(dim=1))
            here_T = self.targets_T[part] - begin
            inside_T = (here_T >= 0) & (here_T < len(chunk_VE))
            found_T = logits_TV.gather(1, here_T.clamp(0, len(chunk_VE) - 1)[:, None]).squeeze(1)
            self.target_T[part] += torch.where(inside_T, found_T, torch.zeros_like(found_T))


@torch.inference_mode()
def _evaluate(model: HybridLM, batch: Batch) -> LossAndTop1:
    """For one batch of a model in memory."""
    rows_T = batch.targets_T != IGNORED
    hidden_TE, targets_T = model.hidden(batch.tokens_T, batch.layout)[rows_T], batch.targets_T[rows_T]
    if not len(targets_T):
        return hidden_TE.new_zeros(0), targets_T
    losses, top1 = [], []
    for part_TE, target_T in zip(hidden_TE.split(LOGIT_ROWS), targets_T.split(LOGIT_ROWS), strict=True):
        logits_TV = (part_TE @ model.head_weight.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="none").double())
        top1.append(logits_TV.argmax(dim=-1))
    return torch.cat(losses), torch.cat(top1)


def _mean_loss(found: list[LossAndTop1]) -> float:
    return float(torch.cat([loss_T for loss_T, _ in found]).mean())
