"""Importance of whole layers: how much the logits change when one is skipped (paper, section 5).

The head is linear, so the change needs no logits: with d = h' - h the change of the final hidden state and W the head,
    mean over the vocabulary of (W d)^2  =  d^T (W^T W) d / V
and W^T W is made once.

T tokens · E embedding · V vocabulary · L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.compress.calibration import Calibration
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM


@dataclass(frozen=True)
class LayerRanking:
    """score_L: mean squared change of the logits without each layer alone. order: layers, the first to go first."""

    score_L: Tensor
    order: tuple[int, ...]


@torch.no_grad()
def rank_layers(
    model: HybridLM, calibration: Calibration, rounds: int = 0, batch_tokens: int = 4096, advance: Callable[[int], object] | None = None
) -> LayerRanking:
    """Skip each layer in turn. The first `rounds` places of the order are found iteratively, as the paper does: the layer that
    changes the logits least is removed for good before the next is sought; the others follow by their one-shot scores.
    """
    gram_EE = gram(model.head_weight)
    batches = [batch.to(model.device) for batch in calibration.batches(batch_tokens)]
    truth = [model.hidden(batch.tokens_T, batch.layout) for batch in batches]
    left = list(range(model.config.num_hidden_layers))
    score_L, gone = None, []
    for number in range(max(1, min(rounds, len(left) - 1))):
        changes = skipped(model, left, batches, truth, gram_EE)
        if score_L is None:
            score_L = torch.tensor(changes)
        if number < rounds:
            gone.append(left.pop(min(range(len(left)), key=changes.__getitem__)))
        if advance is not None:
            advance(1)
    assert score_L is not None
    rest = sorted(left, key=lambda layer: (float(score_L[layer]), layer))
    return LayerRanking(score_L, (*gone, *rest))


def skipped(model: HybridLM, left: Sequence[int], batches: Sequence[Batch], truth: Sequence[Tensor], gram_EE: Tensor) -> list[float]:
    """For each layer of `left`: the mean squared change of the logits when the model is `left` without it."""
    sums, tokens = [0.0] * len(left), 0
    blocks = [model.backbone.layers[layer] for layer in left]
    for batch, final_TE in zip(batches, truth, strict=True):
        before_TE = model.backbone.embeddings(batch.tokens_T)
        tokens += batch.layout.tokens
        for place, block in enumerate(blocks):
            h_TE = before_TE
            for later in blocks[place + 1 :]:
                h_TE = later(h_TE, batch.layout, None)
            change_TE = (model.backbone.norm_f(h_TE) - final_TE).float()
            sums[place] += float(((change_TE @ gram_EE) * change_TE).sum()) / model.config.vocab_size
            before_TE = block(before_TE, batch.layout, None)
    return [total / tokens for total in sums]


def gram(head_VE: Tensor) -> Tensor:
    """W^T W in fp32, added up over slices of the vocabulary."""
    total_EE = head_VE.new_zeros(head_VE.shape[1], head_VE.shape[1], dtype=torch.float32)
    for part_VE in head_VE.split(16_384):
        total_EE.addmm_(part_VE.float().T, part_VE.float())
    return total_EE
