"""Depth importance: how much the logits change when one layer is skipped (paper, section 5).

The head is linear, so the change needs no logits. With d = h' - h the change of the final hidden state and W
the head,
    mean over the vocabulary of (W d)^2  =  d^T (W^T W) d / V
and W^T W is computed once.

A model that does not fit the memory is read layer by layer. The hidden states of all models that lack one
more layer go through the layers together, as many documents at a time as fit, and with them those of the
whole model, to compare with. It costs the same FLOPs, and one reading of the checkpoint for each round and
each group of documents.

T tokens · E hidden size · V vocabulary · L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.estimate.units import GIB
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.layerwise import LayerwiseModel, LoadedModel, head_gram

BATCH_TOKENS = 4096
HIDDEN_BYTES = 2 * GIB
"""Bytes of hidden states, of models that lack a layer, that are held at once."""


@dataclass(frozen=True)
class LayerRanking:
    """score_L: mean squared change of the logits without each layer alone. order: the layers, the least
    important first."""

    score_L: Tensor
    order: tuple[int, ...]


@torch.no_grad()
def rank_layers(
    model: HybridLM,
    calibration: Calibration,
    rounds: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """Rank the layers of a model in memory by skipping each in turn.

    rounds: so many places of the order are found iteratively, as in the paper: the layer that changes the
    logits least is removed before the next one is searched. The other layers follow by their one-shot scores.
    """
    gram_EE = head_gram(LoadedModel(model))
    batches = [batch.to(model.device) for batch in calibration.batches(batch_tokens)]
    expected = [model.hidden(batch.tokens_T, batch.layout) for batch in batches]
    return _rank(
        model.config, rounds, lambda left: changes_without(model, left, batches, expected, gram_EE), advance
    )


@torch.no_grad()
def rank_layers_streamed(
    model: LayerwiseModel,
    calibration: Calibration,
    rounds: int = 0,
    hidden_bytes: int = HIDDEN_BYTES,
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """As `rank_layers`, with one layer in memory at a time and at most about `hidden_bytes` of hidden states.

    In each round the layers are read once for each group of documents whose hidden states fit; a group has at
    least one document.
    """
    each = 4 * model.config.hidden_size * (model.config.num_hidden_layers + 2)
    batch_tokens = min(BATCH_TOKENS, max(1, hidden_bytes // each))
    batches = [batch.to(model.device) for batch in calibration.batches(batch_tokens)]
    gram_EE = head_gram(model)
    return _rank(
        model.config, rounds, lambda left: changes_without_streamed(model, left, batches, gram_EE, advance)
    )


def _rank(
    config: HybridConfig,
    rounds: int,
    changes_of: Callable[[list[int]], list[float]],
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """The ranking. changes_of: for each of the given layers, the change of the logits of a model of these
    layers without it."""
    left = list(range(config.num_hidden_layers))
    score_L, removed = None, []
    for number in range(max(1, min(rounds, len(left) - 1))):
        changes = changes_of(left)
        if score_L is None:
            score_L = torch.tensor(changes)
        if number < rounds:
            removed.append(left.pop(min(range(len(left)), key=changes.__getitem__)))
        if advance is not None:
            advance(1)
    assert score_L is not None
    rest = sorted(left, key=lambda layer: (float(score_L[layer]), layer))
    return LayerRanking(score_L, (*removed, *rest))


def changes_without(
    model: HybridLM,
    left: Sequence[int],
    batches: Sequence[Batch],
    expected: Sequence[Tensor],
    gram_EE: Tensor,
) -> list[float]:
    """For each layer of `left`: the mean squared change of the logits when the model is `left` without it.

    expected: the final hidden states [T, E] of the whole model for each batch.
    """
    sums, tokens = [0.0] * len(left), 0
    blocks = [model.backbone.layers[layer] for layer in left]
    for batch, final_TE in zip(batches, expected, strict=True):
        before_TE = model.backbone.embeddings(batch.tokens_T)
        tokens += batch.layout.tokens
        for place, block in enumerate(blocks):
            h_TE = before_TE
            for later in blocks[place + 1 :]:
                h_TE = later(h_TE, batch.layout, None)
            change_TE = model.backbone.norm_f(h_TE) - final_TE
            sums[place] += squared_change(change_TE, gram_EE) / model.config.vocab_size
            before_TE = block(before_TE, batch.layout, None)
    return [total / tokens for total in sums]


def changes_without_streamed(
    model: LayerwiseModel,
    left: Sequence[int],
    batches: Sequence[Batch],
    gram_EE: Tensor,
    advance: Callable[[int], object] | None = None,
) -> list[float]:
    """As `changes_without`, with one layer in memory at a time."""
    sums, tokens, all_left = [0.0] * len(left), 0, len(left) == model.config.num_hidden_layers
    for batch in batches:
        (whole_TE,) = model.embedded([batch.tokens_T])
        expected_TE = whole_TE
        without: list[Tensor] = []  # by layer: the hidden states so far of the model that lacks it
        tokens += batch.layout.tokens
        for layer, block in enumerate(model.blocks()):
            if layer in left:
                for place, h_TE in enumerate(without):
                    without[place] = block(h_TE, batch.layout, None)
                without.append(whole_TE)
                whole_TE = block(whole_TE, batch.layout, None)
            expected_TE = whole_TE if all_left else block(expected_TE, batch.layout, None)
            if advance is not None:
                advance(batch.layout.tokens)
        norm = model.final_norm()
        final_TE = norm(expected_TE)
        for place, h_TE in enumerate(without):
            sums[place] += squared_change(norm(h_TE) - final_TE, gram_EE) / model.config.vocab_size
    return [total / tokens for total in sums]


def squared_change(change_TE: Tensor, gram_EE: Tensor) -> float:
    """The squared change of the logits for a change [T, E] of the final hidden states, added up over tokens
    and vocabulary."""
    change_TE = change_TE.float()
    return float(((change_TE @ gram_EE) * change_TE).sum())
