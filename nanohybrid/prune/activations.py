"""Importance by activations (paper, section 5): the mean of |a| over a sequence, then the L2 norm over the samples.

What a is, for each axis:
    embedding channel   outputs of the norms, summed over all of them
    FFN neuron          after the nonlinearity, which is what down_proj reads
    Mamba head, channel the x slice of in_proj's output
    attention head      what o_proj reads: L2 over the head's channels
    layer               1 minus the cosine between the hidden state before it and after; over the samples the root mean square, so that
                        it stays between 0 and 2

With `outgoing`, each score is multiplied by the L2 norm of the weights that read this activation: a neuron that fires into
nothing does nothing. For pruning before any retraining this is the better ranking (docs/compress.md has numbers); without it the
scores are the paper's.

One layer at a time: all samples go through it before the next is asked for, so that only one layer's weights need to be there.

Everything is scored three times, on all samples, on the even and on the odd ones: how far the last two agree says how far the
rankings are those of the model, and not of the samples.

T tokens · S samples · D features · E embedding · F FFN width · H heads · P head dimension · R the three scorings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.model import HybridLM, Layout
from nanohybrid.model.lm import Block
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.layerwise import Loaded, Parts, head_norm
from nanohybrid.prune.rank_stability import agreement

READERS = {
    MAMBA: "out_proj",
    MLP: "down_proj",
    ATTENTION: "o_proj",
}  # what reads a mixer's inner activations, and writes its output


class Aggregate:
    """Running sums over samples of (mean over the sequence of |a|)^2: of the even samples, and of the odd ones."""

    def __init__(self) -> None:
        self.squares_2D: Tensor | None = None
        self.samples = 0

    def add(self, a_TD: Tensor, layout: Layout) -> None:
        """Take the activations of one batch."""
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
        """L2 over the samples seen: all, the even, the odd."""
        assert self.squares_2D is not None, "no batch was seen"
        return torch.cat([self.squares_2D.sum(0, keepdim=True), self.squares_2D]).sqrt().cpu()


@torch.no_grad()
def measure_activations(
    model: HybridLM | Parts,
    calibration: Calibration,
    outgoing: bool = True,
    batch_tokens: int = 4096,
    advance: Callable[[int], object] | None = None,
) -> Importance:
    """Scores of every axis of a model in memory or on the disk, in one pass over the calibration set."""
    parts: Parts = Loaded(model) if isinstance(model, HybridLM) else model
    config = parts.config
    batches = [batch.to(parts.device) for batch in calibration.batches(batch_tokens)]
    layouts = [batch.layout for batch in batches]
    hidden = parts.embedded([batch.tokens_T for batch in batches])
    channels_RE = torch.zeros(3, config.hidden_size)
    tables: dict[str, dict[int, Tensor]] = {MAMBA: {}, MLP: {}, ATTENTION: {}}
    turns: list[Tensor] = []
    for index, (kind, block) in enumerate(zip(config.pattern, parts.blocks(), strict=True)):
        norm, mixer, turn = through(block, kind, config, hidden, layouts, advance)
        turns.append(turn.score_RD)
        channels_RE += norm.score_RD * (reader_norm(block.mixer) if outgoing else 1.0)
        tables[kind][index] = scores_of(block.mixer, kind, config, mixer.score_RD, outgoing)
    last, final_norm = Aggregate(), parts.final_norm()
    for h_TE, layout in zip(hidden, layouts, strict=True):
        last.add(final_norm(h_TE), layout)
    channels_RE += last.score_RD * (head_norm(parts) if outgoing else 1.0)
    cosine_RL = torch.cat(turns, dim=1)
    facts = {
        "calibration": calibration.hash, "samples": len(calibration.samples), "tokens": calibration.tokens,
        "outgoing": outgoing, "pattern": config.pattern, "aggregation": "mean over the sequence, L2 over samples",
        "stability": agreement(channels_RE, tables, cosine_RL) if len(calibration.samples) > 1 else {},
    }  # fmt: skip
    whole = {kind: {index: scores[0] for index, scores in table.items()} for kind, table in tables.items()}
    return Importance(
        channels_RE[0],
        whole[MLP],
        whole[MAMBA],
        whole[ATTENTION],
        facts=facts,
        cosine=cosine_RL[0] / len(calibration.samples) ** 0.5,
    )


def through(
    block: Block,
    kind: str,
    config: HybridConfig,
    hidden: list[Tensor],
    layouts: Sequence[Layout],
    advance: Callable[[int], object] | None = None,
) -> tuple[Aggregate, Aggregate, Aggregate]:
    """Take the hidden states of all batches through a layer, in place in the list: aggregates of its norm, of its mixer, and of how
    far it turns the hidden state.
    """
    norm, mixer, turn = Aggregate(), Aggregate(), Aggregate()
    for place, layout in enumerate(layouts):
        with watching(block, kind, config, layout, norm, mixer):
            after_TE = block(hidden[place], layout, None)
        turn.add(
            1 - torch.cosine_similarity(hidden[place].double(), after_TE.double(), dim=1)[:, None], layout
        )
        hidden[place] = after_TE
        if advance is not None:
            advance(layout.tokens)
    return norm, mixer, turn


@contextmanager
def watching(
    block: Block, kind: str, config: HybridConfig, layout: Layout, norm: Aggregate, mixer: Aggregate
) -> Iterator[None]:
    """While this is open, a forward of the layer over `layout` adds its activations to the aggregates."""

    def output_of(module: nn.Module, aggregate: Aggregate, last: int | None = None, first: int = 0) -> Any:
        return module.register_forward_hook(lambda _m, _i, out: aggregate.add(out[..., first:last], layout))

    def input_of(module: nn.Module, aggregate: Aggregate) -> Any:
        return module.register_forward_pre_hook(lambda _m, inputs: aggregate.add(inputs[0], layout))

    handles = [output_of(block.norm, norm)]
    if kind == MAMBA:
        inner = config.mamba_inner_size  # in_proj's output is z | x B C | dt
        handles.append(output_of(block.mixer.get_submodule("in_proj"), mixer, 2 * inner, inner))
    else:
        handles.append(input_of(block.mixer.get_submodule(READERS[kind]), mixer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scores_of(mixer: nn.Module, kind: str, config: HybridConfig, score_RD: Tensor, outgoing: bool) -> Tensor:
    """A mixer's aggregates as scores: [R, F] of an MLP, [R, H, P] of Mamba, [R, H] of attention."""
    if outgoing:
        weight = mixer.get_parameter(f"{READERS[kind]}.weight")
        score_RD = score_RD * weight.float().norm(dim=0).cpu()
    if kind == MAMBA:
        return score_RD.unflatten(1, (config.mamba_num_heads, config.mamba_head_dim))
    if kind == ATTENTION:
        return score_RD.unflatten(1, (config.num_attention_heads, config.head_dim)).norm(dim=2)
    return score_RD


def reader_norm(mixer: nn.Module) -> Tensor:
    """[E]: the L2 norm of the weights by which a mixer reads each embedding channel."""
    writers = set(READERS.values())
    weights = [
        module.weight
        for name, module in mixer.named_children()
        if isinstance(module, nn.Linear) and name not in writers
    ]
    return torch.stack([weight.float().square().sum(0) for weight in weights]).sum(0).sqrt().cpu()
