"""Depth importance: how much the logits change when one layer is skipped (paper, section 5), or one block of
layers that can only go together (depth_units.py).

The head is linear, so the change needs no logits. With d = h' - h the change of the final hidden state and W
the head,
    mean over the vocabulary of (W d)^2  =  d^T (W^T W) d / V
and W^T W is computed once.

A model that does not fit the memory is read layer by layer. The hidden states of all models that lack one
more layer go through the layers together, as many documents at a time as fit, and with them those of the
whole model, to compare with. It costs the same FLOPs, and one reading of the checkpoint for each round and
each group of documents.

T tokens · E hidden size · V vocabulary · L layers · U units, each a layer or a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from nanohybrid.data import Batch
from nanohybrid.estimate.units import GIB
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_units import LAYER, DepthUnits, depth_units
from nanohybrid.prune.layerwise import LayerwiseModel, LoadedModel, head_gram

BATCH_TOKENS = 4096
HIDDEN_BYTES = 2 * GIB
"""Bytes of hidden states, of models that lack a layer, that are held at once."""


@dataclass(frozen=True)
class LayerRanking:
    """score_L: mean squared change of the logits without the unit of each layer alone. order: the layers, the
    least important unit first."""

    score_L: Tensor
    order: tuple[int, ...]


@torch.no_grad()
def rank_layers(
    model: HybridLM,
    calibration: Calibration,
    rounds: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], object] | None = None,
    *,
    units: DepthUnits | None = None,
    per_parameter: bool = False,
) -> LayerRanking:
    """Rank the layers of a model in memory by skipping each in turn.

    rounds: so many units of the order are found iteratively, as in the paper: the one that changes the logits
    least is removed before the next one is searched. The others follow by their one-shot scores. units: what
    goes together; None: each layer alone. per_parameter: by the change for each parameter that goes.
    """
    gram_EE = head_gram(LoadedModel(model))
    batches = [batch.to(model.device) for batch in calibration.batches(batch_tokens)]
    expected = [model.hidden(batch.tokens_T, batch.layout) for batch in batches]
    return _rank(
        units or depth_units(model.config, LAYER),
        rounds,
        lambda left: changes_without(model, left, batches, expected, gram_EE),
        per_parameter,
        advance,
    )


@torch.no_grad()
def rank_layers_streamed(
    model: LayerwiseModel,
    calibration: Calibration,
    rounds: int = 0,
    hidden_bytes: int = HIDDEN_BYTES,
    advance: Callable[[int], object] | None = None,
    *,
    units: DepthUnits | None = None,
    per_parameter: bool = False,
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
        units or depth_units(model.config, LAYER),
        rounds,
        lambda left: changes_without_streamed(model, left, batches, gram_EE, advance),
        per_parameter,
    )


def _rank(
    units: DepthUnits,
    rounds: int,
    changes_of: Callable[[list[tuple[int, ...]]], list[float]],
    per_parameter: bool,
    advance: Callable[[int], object] | None = None,
) -> LayerRanking:
    """The ranking. changes_of: for each of the given units, the change of the logits of a model of these
    units without it."""
    left = list(range(len(units.layers)))
    cost = units.parameters if per_parameter else (1,) * len(left)
    score_U, removed = None, []
    for number in range(max(1, min(rounds, len(left) - 1))):
        changes = changes_of([units.layers[unit] for unit in left])
        if score_U is None:
            score_U = changes
        if number < rounds:
            least = min(range(len(left)), key=lambda place: changes[place] / cost[left[place]])
            removed.append(left.pop(least))
        if advance is not None:
            advance(1)
    assert score_U is not None
    rest = sorted(left, key=lambda unit: (score_U[unit] / cost[unit], unit))
    order = [layer for unit in (*removed, *rest) for layer in units.layers[unit]]
    score_L = torch.tensor([score_U[unit] for unit, layers in enumerate(units.layers) for _ in layers])
    return LayerRanking(score_L, tuple(order))


def changes_without(
    model: HybridLM,
    left: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    expected: Sequence[Tensor],
    gram_EE: Tensor,
) -> list[float]:
    """For each unit of `left`, given by its layers: the mean squared change of the logits when the model is
    `left` without it.

    expected: the final hidden states [T, E] of the whole model for each batch.
    """
    sums, tokens = [0.0] * len(left), 0
    units = [[model.backbone.layers[layer] for layer in unit] for unit in left]
    for batch, final_TE in zip(batches, expected, strict=True):
        before_TE = model.backbone.embeddings(batch.tokens_T)
        tokens += batch.layout.tokens
        for place, unit in enumerate(units):
            h_TE = before_TE
            for block in chain.from_iterable(units[place + 1 :]):
                h_TE = block(h_TE, batch.layout, None)
            change_TE = model.backbone.norm_f(h_TE) - final_TE
            sums[place] += squared_change(change_TE, gram_EE) / model.config.vocab_size
            for block in unit:
                before_TE = block(before_TE, batch.layout, None)
    return [total / tokens for total in sums]


def changes_without_streamed(
    model: LayerwiseModel,
    left: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    gram_EE: Tensor,
    advance: Callable[[int], object] | None = None,
) -> list[float]:
    """As `changes_without`, with one layer in memory at a time."""
    place_of = {layer: place for place, unit in enumerate(left) for layer in unit}
    sums, tokens, all_left = [0.0] * len(left), 0, len(place_of) == model.config.num_hidden_layers
    for batch in batches:
        (whole_TE,) = model.embedded([batch.tokens_T])
        expected_TE = whole_TE
        without: list[Tensor] = []  # by unit: the hidden states so far of the model that lacks it
        tokens += batch.layout.tokens
        for layer, block in enumerate(model.blocks()):
            if layer in place_of:
                for place, h_TE in enumerate(without):
                    if place != place_of[layer]:
                        without[place] = block(h_TE, batch.layout, None)
                if len(without) == place_of[layer]:
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
