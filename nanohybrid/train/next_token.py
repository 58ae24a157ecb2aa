"""The loss of pretraining and SFT: cross-entropy of the next token of each document, where the loss mask has
a target.

T tokens, E hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.ops.losses import summed_cross_entropy
from nanohybrid.train.precision import Mode, autocast


def next_token_loss(model: HybridLM, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the cross-entropies of a batch in nats (fp32 scalar), and the number of targets."""
    hidden_TE = model.hidden(batch.tokens_T, batch.layout)
    return summed_cross_entropy(hidden_TE, model.head_weight, batch.targets_T), batch.target_count


@torch.no_grad()
def mean_loss(model: HybridLM, batches: Iterable[Batch], mode: Mode = "fp32") -> float:
    """Mean cross-entropy of a target over `batches`, in nats. `mode` is the precision of the forward pass."""
    device = model.device
    total, count = 0.0, 0
    for batch in batches:
        with autocast(mode, device):
            loss, targets = next_token_loss(model, batch.to(device))
        total, count = total + loss.item(), count + targets
    return total / max(count, 1)
