"""Importance by activations (paper, section 5): the mean of |a| over a sequence, then the L2 norm over the
samples.

What a is:
    hidden size          the outputs of the norms; their scores are added up over all norms
    axes of a layer      the activation that its kind declares (`Mixer.activation`), L2 over the axes that are
                         not pruned: what down_proj reads (MLP), what o_proj reads (attention), the x slice of
                         in_proj's output (Mamba-2)
    layer                1 minus the cosine between the hidden state before it and after; over the samples the
                         root mean square, so that it stays between 0 and 2

With `scale_by_outgoing_norm`, each score is multiplied by the L2 norm of the weights that read this
activation, since an activation that nothing reads does not matter. This ranks better where nothing is
retrained (docs/compress.md has numbers). Without it the scores are the paper's.

All samples go through one layer before the next is read, so only one layer's weights need to be in memory.

Everything is scored three times: on all samples, on the even and on the odd ones. How far the last two agree
tells how far the rankings are those of the model, and not of the samples (rank_stability.py).

T tokens · S samples · D columns of an activation · E hidden size · H heads · P head dimension · F FFN width ·
R the three scorings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM, Layout
from nanohybrid.model.lm import Block
from nanohybrid.model.mixers import MIXERS, InnerActivation
from nanohybrid.model.mixers.axes import axis_sizes
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import LayerwiseModel, LoadedModel, head_norm
from nanohybrid.prune.prunable import layer_axes
from nanohybrid.prune.rank_stability import agreement


class Aggregate:
    """Running sums over samples of (mean over the sequence of |a|)^2, of the even samples and of the odd
    ones."""

    def __init__(self) -> None:
        self.squares_2D: Tensor | None = None
        self.samples = 0

    def add(self, a_TD: Tensor, layout: Layout) -> None:
        """Add the activations [T, D] of one batch."""
        sample_T = torch.from_numpy(np.repeat(np.arange(layout.sequences), layout.lengths)).to(a_TD.device)
        lengths_S = torch.tensor(layout.lengths, device=a_TD.device, dtype=torch.float32)
        sums_SD = a_TD.new_zeros(layout.sequences, a_TD.shape[-1], dtype=torch.float32)
        sums_SD.index_add_(0, sample_T, a_TD.detach().abs().float())
        squares_SD = (sums_SD / lengths_S[:, None]).square()
        first = self.samples % 2
        squares_2D = torch.stack([squares_SD[first::2].sum(0), squares_SD[1 - first :: 2].sum(0)])
        self.squares_2D = squares_2D if self.squares_2D is None else self.squares_2D + squares_2D
        self.samples += layout.sequences

    @property
    def score_RD(self) -> Tensor:
        """[R, D]: the L2 norm over all samples, over the even and over the odd ones."""
        assert self.squares_2D is not None, "no batch was added"
        return torch.cat([self.squares_2D.sum(0, keepdim=True), self.squares_2D]).sqrt().cpu()


@torch.no_grad()
def measure_activations(
    model: HybridLM | LayerwiseModel,
    calibration: Calibration,
    scale_by_outgoing_norm: bool = True,
    batch_tokens: int = 4096,
    advance: Callable[[int], object] | None = None,
) -> Importance:
    """Scores of every prunable axis and the cosine of every layer, in one pass over the calibration set.

    model: in memory, or one that gives its layers one by one. advance: called with the tokens that went
    through a layer.
    """
    layers: LayerwiseModel = LoadedModel(model) if isinstance(model, HybridLM) else model
    config = layers.config
    batches = [batch.to(layers.device) for batch in calibration.batches(batch_tokens)]
    layouts = [batch.layout for batch in batches]
    hidden = layers.embedded([batch.tokens_T for batch in batches])
    hidden_RE = torch.zeros(3, config.hidden_size)
    scores: dict[int, Tensor] = {}
    distances: list[Tensor] = []
    for index, (kind, block) in enumerate(zip(config.pattern, layers.blocks(), strict=True)):
        norm, inner, distance = run_layer(block, kind, config, hidden, layouts, advance)
        distances.append(distance.score_RD)
        hidden_RE += norm.score_RD * (
            reader_norm(block.mixer, kind, config) if scale_by_outgoing_norm else 1.0
        )
        if layer_axes(kind):
            scores[index] = scores_of(block.mixer, kind, config, inner.score_RD, scale_by_outgoing_norm)
    last, final_norm = Aggregate(), layers.final_norm()
    for h_TE, layout in zip(hidden, layouts, strict=True):
        last.add(final_norm(h_TE), layout)
    hidden_RE += last.score_RD * (head_norm(layers) if scale_by_outgoing_norm else 1.0)
    cosine_RL = torch.cat(distances, dim=1)
    axes = {index: tuple(one.axis for one in layer_axes(config.pattern[index])) for index in scores}
    stability = {}
    if len(calibration.samples) > 1:
        stability = agreement(config.pattern, hidden_RE, scores, axes, cosine_RL)
    facts = {
        "calibration": calibration.hash,
        "samples": len(calibration.samples),
        "tokens": calibration.tokens,
        "scale_by_outgoing_norm": scale_by_outgoing_norm,
        "pattern": config.pattern,
        "aggregation": "mean over the sequence, L2 over samples",
        "stability": stability,
    }
    return Importance(
        hidden_RE[0],
        {index: rows[0] for index, rows in scores.items()},
        axes,
        facts=facts,
        cosine=cosine_RL[0] / len(calibration.samples) ** 0.5,
    )


def run_layer(
    block: Block,
    kind: str,
    config: HybridConfig,
    hidden: list[Tensor],
    layouts: Sequence[Layout],
    advance: Callable[[int], object] | None = None,
) -> tuple[Aggregate, Aggregate, Aggregate]:
    """Run the hidden states of all batches through a layer, in place in the list.

    Returns aggregates of the norm's output, of the mixer's inner activation (empty where nothing of the layer
    is pruned), and of 1 minus the cosine between the hidden states before and after.
    """
    norm, inner, distance = Aggregate(), Aggregate(), Aggregate()
    for place, layout in enumerate(layouts):
        with observed_by(block, kind, config, layout, norm, inner):
            after_TE = block(hidden[place], layout, None)
        cosine_T = torch.cosine_similarity(hidden[place].double(), after_TE.double(), dim=1)
        distance.add(1 - cosine_T[:, None], layout)
        hidden[place] = after_TE
        if advance is not None:
            advance(layout.tokens)
    return norm, inner, distance


@contextmanager
def observed_by(
    block: Block, kind: str, config: HybridConfig, layout: Layout, norm: Aggregate, inner: Aggregate
) -> Iterator[None]:
    """While this is open, a forward of the layer over `layout` adds its activations to the aggregates."""
    handles = [block.norm.register_forward_hook(lambda _m, _i, out: norm.add(out, layout))]
    if layer_axes(kind):
        observed = activation_of(kind)
        columns = slice(None) if observed.columns is None else slice(*observed.columns(config))
        module = block.mixer.get_submodule(observed.module)

        def add_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            inner.add(output[..., columns], layout)

        def add_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inner.add(inputs[0][..., columns], layout)

        if observed.side == "output":
            handles.append(module.register_forward_hook(add_output))
        else:
            handles.append(module.register_forward_pre_hook(add_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_of(kind: str) -> InnerActivation:
    """Where a kind's activations are observed; of a kind with prunable axes."""
    found = MIXERS[kind].activation
    assert found is not None, f"{kind} declares prunable axes and no activation: register() refuses that"
    return found


def scores_of(
    mixer: nn.Module, kind: str, config: HybridConfig, score_RD: Tensor, scale_by_outgoing_norm: bool
) -> Tensor:
    """The aggregate of an inner activation as scores over the layer's prunable axes: [R, F], [R, H, P], [R,
    H]."""
    observed = activation_of(kind)
    if scale_by_outgoing_norm:
        weight = mixer.get_parameter(f"{observed.writer}.weight")
        score_RD = score_RD * weight.float().norm(dim=0).cpu()
    sizes = axis_sizes(config)
    scores = score_RD.unflatten(1, [sizes[axis] for axis in observed.axes])
    pruned = {one.axis for one in layer_axes(kind)}
    others = tuple(place for place, axis in enumerate(observed.axes, 1) if axis not in pruned)
    return scores.norm(dim=others) if others else scores


def reader_norm(mixer: nn.Module, kind: str, config: HybridConfig) -> Tensor:
    """[E]: the L2 norm of the weights by which a mixer reads each channel of the hidden size."""
    parameters = MIXERS[kind].declare(config).parameters
    read = [name for name, axes in parameters.items() if len(axes) == 2 and axes[1] == "hidden_size"]
    weights = [mixer.get_parameter(name) for name in read]
    if not weights:
        return torch.zeros(config.hidden_size)
    return torch.stack([weight.float().square().sum(0) for weight in weights]).sum(0).sqrt().cpu()
