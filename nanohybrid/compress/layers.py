"""Importance of whole layers: how much the logits change when one is skipped (paper, section 5).

The head is linear, so the change needs no logits: with d = h' - h the change of the final hidden state and W the head,
    mean over the vocabulary of (W d)^2  =  d^T (W^T W) d / V
and W^T W is made once.

Iteratively this needs the whole model in memory. One-shot it can be read layer by layer: the hidden states of all models that lack one
layer go through the layers together, as many documents at a time as fit beside them.

T tokens · E embedding · V vocabulary · L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.compress.calibration import Calibration
from nanohybrid.compress.parts import Parts, gram
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM

BATCH = 4096  # tokens at once
HELD = 2 * 2**30  # bytes of hidden states of models that lack a layer


@dataclass(frozen=True)
class LayerRanking:
    """score_L: mean squared change of the logits without each layer alone. order: layers, the first to go first."""

    score_L: Tensor
    order: tuple[int, ...]


@torch.no_grad()
def rank_layers(
    model: HybridLM, calibration: Calibration, rounds: int = 0, batch_tokens: int = BATCH, advance: Callable[[int], object] | None = None
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
            sums[place] += squared_change(model.backbone.norm_f(h_TE) - final_TE, gram_EE) / model.config.vocab_size
            before_TE = block(before_TE, batch.layout, None)
    return [total / tokens for total in sums]


@torch.no_grad()
def rank_layers_streamed(
    parts: Parts, calibration: Calibration, held_bytes: int = HELD, advance: Callable[[int], object] | None = None
) -> LayerRanking:
    """The one-shot scores of `rank_layers`, one layer in memory at a time, and at most about `held_bytes` of hidden states.

    The layers are read once for each group of documents whose hidden states fit; a single document is a group of its own at least.
    """
    layers, gram_EE = parts.config.num_hidden_layers, parts.head_gram()
    sums, each = torch.zeros(layers, dtype=torch.float64), 4 * parts.config.hidden_size * (layers + 1)
    for batch in (batch.to(parts.device) for batch in calibration.batches(min(BATCH, max(1, held_bytes // each)))):
        (whole_TE,) = parts.embedded([batch.tokens_T])
        without: list[Tensor] = []  # by layer: the hidden states so far of the model that lacks it
        for block in parts.blocks():
            without = [block(h_TE, batch.layout, None) for h_TE in without] + [whole_TE]
            whole_TE = block(whole_TE, batch.layout, None)
            if advance is not None:
                advance(batch.layout.tokens)
        norm = parts.final_norm()
        final_TE = norm(whole_TE)
        sums += torch.tensor([squared_change(norm(h_TE) - final_TE, gram_EE) for h_TE in without], dtype=torch.float64)
    score_L = (sums / parts.config.vocab_size / calibration.tokens).float()
    return LayerRanking(score_L, tuple(sorted(range(layers), key=lambda layer: (float(score_L[layer]), layer))))


def squared_change(change_TE: Tensor, gram_EE: Tensor) -> float:
    """The squared change of the logits, added up over tokens and vocabulary, for a change of the final hidden states."""
    change_TE = change_TE.float()
    return float(((change_TE @ gram_EE) * change_TE).sum())
