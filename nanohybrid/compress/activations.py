"""Importance by activations (paper, section 5): the mean of |a| over a sequence, then the L2 norm over the samples.

What a is, for each axis:
    embedding channel   outputs of the norms, summed over all of them
    FFN neuron          after the nonlinearity, which is what down_proj reads
    Mamba head, channel the x slice of in_proj's output
    attention head      what o_proj reads: L2 over the head's channels

With `outgoing`, each score is multiplied by the L2 norm of the weights that read this activation: a neuron that fires into
nothing does nothing. For pruning before any retraining this is the better ranking (docs/compress.md has numbers); without it the
scores are the paper's.

T tokens · S samples · D features · E embedding · F FFN width · H heads · P head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanohybrid.compress.calibration import Calibration
from nanohybrid.compress.importance import Importance
from nanohybrid.config import ATTENTION, MAMBA, MLP
from nanohybrid.model import HybridLM, Layout


class Aggregate:
    """Running sum over samples of (mean over the sequence of |a|)^2."""

    def __init__(self) -> None:
        self.squares_D: Tensor | None = None

    def add(self, a_TD: Tensor, layout: Layout) -> None:
        """Take the activations of one batch."""
        sample_T = torch.from_numpy(np.repeat(np.arange(layout.sequences), layout.lengths)).to(a_TD.device)
        lengths_S = torch.tensor(layout.lengths, device=a_TD.device, dtype=torch.float32)
        sums_SD = a_TD.new_zeros(layout.sequences, a_TD.shape[-1], dtype=torch.float32)
        sums_SD.index_add_(0, sample_T, a_TD.detach().abs().float())
        squares_D = (sums_SD / lengths_S[:, None]).square().sum(0)
        self.squares_D = squares_D if self.squares_D is None else self.squares_D + squares_D

    @property
    def score_D(self) -> Tensor:
        """L2 over the samples seen."""
        assert self.squares_D is not None, "no batch was seen"
        return self.squares_D.sqrt().cpu()


@torch.no_grad()
def measure_activations(
    model: HybridLM,
    calibration: Calibration,
    outgoing: bool = True,
    batch_tokens: int = 4096,
    advance: Callable[[int], object] | None = None,
) -> Importance:
    """Scores of every axis of `model`, in one pass over the calibration set."""
    norms: dict[int, Aggregate] = {index: Aggregate() for index in range(len(model.config.pattern) + 1)}
    mixers: dict[int, Aggregate] = {index: Aggregate() for index in range(len(model.config.pattern))}
    for batch in calibration.batches(batch_tokens):
        batch = batch.to(model.head_weight.device)
        with watching(model, batch.layout, norms, mixers):
            model.hidden(batch.tokens_T, batch.layout)
        if advance is not None:
            advance(batch.layout.tokens)
    return collect(model, norms, mixers, outgoing, calibration)


@contextmanager
def watching(model: HybridLM, layout: Layout, norms: dict[int, Aggregate], mixers: dict[int, Aggregate]) -> Iterator[None]:
    """While this is open, a forward over `layout` adds its activations to the aggregates."""

    def output_of(module: nn.Module, aggregate: Aggregate, last: int | None = None, first: int = 0) -> Any:
        return module.register_forward_hook(lambda _m, _i, out: aggregate.add(out[..., first:last], layout))

    def input_of(module: nn.Module, aggregate: Aggregate) -> Any:
        return module.register_forward_pre_hook(lambda _m, inputs: aggregate.add(inputs[0], layout))

    handles = [output_of(model.backbone.norm_f, norms[len(model.config.pattern)])]
    for index, (kind, block) in enumerate(zip(model.config.pattern, model.backbone.layers, strict=True)):
        handles.append(output_of(block.norm, norms[index]))  # type: ignore[arg-type]
        mixer: Any = block.mixer
        if kind == MAMBA:
            inner = model.config.mamba_inner_size  # in_proj's output is z | x B C | dt
            handles.append(output_of(mixer.in_proj, mixers[index], 2 * inner, inner))
        else:
            handles.append(input_of(mixer.down_proj if kind == MLP else mixer.o_proj, mixers[index]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(
    model: HybridLM, norms: dict[int, Aggregate], mixers: dict[int, Aggregate], outgoing: bool, calibration: Calibration
) -> Importance:
    """The aggregates as scores by axis."""
    config = model.config
    mixers_of: list[Any] = [block.mixer for block in model.backbone.layers]
    readers = [reader_norm(mixer) for mixer in mixers_of] + [model.head_weight.float().norm(dim=0).cpu()]
    channel = [norms[i].score_D * (readers[i] if outgoing else 1.0) for i in norms]
    tables: dict[str, dict[int, Tensor]] = {MAMBA: {}, MLP: {}, ATTENTION: {}}
    names = {MAMBA: "out_proj", MLP: "down_proj", ATTENTION: "o_proj"}
    for index, (kind, mixer) in enumerate(zip(config.pattern, mixers_of, strict=True)):
        score_D = mixers[index].score_D
        if outgoing:
            score_D = score_D * getattr(mixer, names[kind]).weight.float().norm(dim=0).cpu()
        if kind == MAMBA:
            score_D = score_D.unflatten(0, (config.mamba_num_heads, config.mamba_head_dim))
        elif kind == ATTENTION:
            score_D = score_D.unflatten(0, (config.num_attention_heads, config.head_dim)).norm(dim=1)
        tables[kind][index] = score_D
    facts = {
        "calibration": calibration.hash, "samples": len(calibration.samples), "tokens": calibration.tokens,
        "outgoing": outgoing, "pattern": config.pattern, "aggregation": "mean over the sequence, L2 over samples",
    }  # fmt: skip
    return Importance(torch.stack(channel).sum(0), tables[MLP], tables[MAMBA], tables[ATTENTION], facts=facts)


def reader_norm(mixer: nn.Module) -> Tensor:
    """[E]: the L2 norm of the weights by which a mixer reads each embedding channel."""
    weights = [module.weight for name, module in mixer.named_children() if isinstance(module, nn.Linear) and name not in WRITERS]
    return torch.stack([weight.float().square().sum(0) for weight in weights]).sum(0).sqrt().cpu()


WRITERS = ("out_proj", "down_proj", "o_proj")
