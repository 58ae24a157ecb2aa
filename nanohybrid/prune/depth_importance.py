"""Importance of whole layers: how much the logits change when one is skipped (paper, section 5).

The head is linear, so the change needs no logits: with d = h' - h the change of the final hidden state and W the head,
    mean over the vocabulary of (W d)^2  =  d^T (W^T W) d / V
and W^T W is made once.

Where the model has no room whole it is read layer by layer: the hidden states of all models that lack one more layer go through the
layers together, as many documents at a time as fit beside them, and with them those of the whole model, to compare with. It costs the
same multiplications, and for each round and each group of documents a reading of the checkpoint.

T tokens · E embedding · V vocabulary · L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.layerwise import Loaded, Parts, head_gram

BATCH = 4096  # tokens at once
HELD = 2 * 2**30  # bytes of hidden states of models that lack a layer


@dataclass(frozen=True)
class LayerRanking:
    """score_L: mean squared change of the logits without each layer alone. order: layers, the first to go first."""

    score_L: Tensor
    order: tuple[int, ...]


@torch.no_grad()
def rank_layers(
    model: HybridLM,
    calibration: Calibration,
    rounds: int = 0,
    batch_tokens: int = BATCH,
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """Skip each layer in turn. The first `rounds` places of the order are found iteratively, as the paper does: the layer that
    changes the logits least is removed for good before the next is sought; the others follow by their one-shot scores.
    """
    gram_EE = head_gram(Loaded(model))
    batches = [batch.to(model.device) for batch in calibration.batches(batch_tokens)]
    truth = [model.hidden(batch.tokens_T, batch.layout) for batch in batches]
    return _rounds(model.config, rounds, lambda left: skipped(model, left, batches, truth, gram_EE), advance)


@torch.no_grad()
def rank_layers_streamed(
    parts: Parts,
    calibration: Calibration,
    rounds: int = 0,
    held_bytes: int = HELD,
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """The same with one layer in memory at a time, and at most about `held_bytes` of hidden states.

    The layers are read once in each round for each group of documents whose hidden states fit; a single document is a group of its own
    at least.
    """
    each = 4 * parts.config.hidden_size * (parts.config.num_hidden_layers + 2)
    batches = [
        batch.to(parts.device) for batch in calibration.batches(min(BATCH, max(1, held_bytes // each)))
    ]
    gram_EE = head_gram(parts)
    return _rounds(
        parts.config, rounds, lambda left: skipped_streamed(parts, left, batches, gram_EE, advance)
    )


def _rounds(
    config: HybridConfig,
    rounds: int,
    changes_of: Callable[[list[int]], list[float]],
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """The order, from what each layer of those that are left changes."""
    left = list(range(config.num_hidden_layers))
    score_L, gone = None, []
    for number in range(max(1, min(rounds, len(left) - 1))):
        changes = changes_of(left)
        if score_L is None:
            score_L = torch.tensor(changes)
        if number < rounds:
            gone.append(left.pop(min(range(len(left)), key=changes.__getitem__)))
        if advance is not None:
            advance(1)
    assert score_L is not None
    rest = sorted(left, key=lambda layer: (float(score_L[layer]), layer))
    return LayerRanking(score_L, (*gone, *rest))


def skipped(
    model: HybridLM, left: Sequence[int], batches: Sequence[Batch], truth: Sequence[Tensor], gram_EE: Tensor
) -> list[float]:
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
            sums[place] += (
                squared_change(model.backbone.norm_f(h_TE) - final_TE, gram_EE) / model.config.vocab_size
            )
            before_TE = block(before_TE, batch.layout, None)
    return [total / tokens for total in sums]


def skipped_streamed(
    parts: Parts,
    left: Sequence[int],
    batches: Sequence[Batch],
    gram_EE: Tensor,
    advance: Callable[[int], object] | None = None,
) -> list[float]:
    """The same, layer by layer."""
    sums, tokens, all_there = [0.0] * len(left), 0, len(left) == parts.config.num_hidden_layers
    for batch in batches:
        (whole_TE,) = parts.embedded([batch.tokens_T])
        truth_TE = whole_TE
        without: list[Tensor] = []  # by layer: the hidden states so far of the model that lacks it
        tokens += batch.layout.tokens
        for layer, block in enumerate(parts.blocks()):
            if layer in left:
                for place, h_TE in enumerate(without):
                    without[place] = block(h_TE, batch.layout, None)
                without.append(whole_TE)
                whole_TE = block(whole_TE, batch.layout, None)
            truth_TE = whole_TE if all_there else block(truth_TE, batch.layout, None)
            if advance is not None:
                advance(batch.layout.tokens)
        norm = parts.final_norm()
        final_TE = norm(truth_TE)
        for place, h_TE in enumerate(without):
            sums[place] += squared_change(norm(h_TE) - final_TE, gram_EE) / parts.config.vocab_size
    return [total / tokens for total in sums]


def squared_change(change_TE: Tensor, gram_EE: Tensor) -> float:
    """The squared change of the logits, added up over tokens and vocabulary, for a change of the final hidden states."""
    change_TE = change_TE.float()
    return float(((change_TE @ gram_EE) * change_TE).sum())
