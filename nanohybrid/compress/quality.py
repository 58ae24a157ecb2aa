"""How good a pruned model is before and after it learns: its loss on documents, and how often its next token is the parent's.

T tokens · E embedding · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.compress.calibration import Calibration
from nanohybrid.data import Batch
from nanohybrid.data.packing import IGNORED
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM

ROWS = 1024  # tokens whose logits are held at once


@dataclass(frozen=True)
class Quality:
    """Mean cross-entropy of a target token, in nats; the share of targets at which the likeliest token is the parent's."""

    loss: float
    agreement: float


class Judge:
    """Compares models with their parent on the target tokens of a calibration set; the parent is run once."""

    def __init__(self, parent: HybridLM, calibration: Calibration) -> None:
        self.batches = [batch.to(parent.head_weight.device) for batch in calibration.batches()]
        if not any(batch.target_count for batch in self.batches):
            raise InputError("the calibration documents hold no token to learn: give documents whose tokens are targets")
        found = [_read(parent, batch) for batch in self.batches]
        self.likeliest = [likeliest_T for _, likeliest_T in found]
        self.parent = Quality(_mean(found), 1.0)

    def __call__(self, model: HybridLM) -> Quality:
        """The quality of a model of the same vocabulary."""
        found = [_read(model, batch) for batch in self.batches]
        pairs = zip(found, self.likeliest, strict=True)
        same = sum(int((likeliest_T == parents_T).sum()) for (_, likeliest_T), parents_T in pairs)
        return Quality(_mean(found), same / sum(len(likeliest_T) for likeliest_T in self.likeliest))


@torch.inference_mode()
def _read(model: HybridLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each target of a batch: its loss, and the likeliest token there."""
    rows_T = batch.targets_T != IGNORED
    hidden_TE, targets_T = model.hidden(batch.tokens_T, batch.layout)[rows_T], batch.targets_T[rows_T]
    losses, likeliest = [], []
    for part_TE, target_T in zip(hidden_TE.split(ROWS), targets_T.split(ROWS), strict=True):
        logits_TV = (part_TE @ model.head_weight.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="none").double())
        likeliest.append(logits_TV.argmax(dim=-1))
    return torch.cat(losses) if losses else hidden_TE.new_zeros(0), torch.cat(likeliest) if likeliest else targets_T


def _mean(found: list[tuple[Tensor, Tensor]]) -> float:
    return float(torch.cat([loss_T for loss_T, _ in found]).mean())
