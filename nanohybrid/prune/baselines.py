"""Baselines that importance by activations is compared with. Neither needs a document.

    magnitude   the L2 norm of all weights that write or read an entry
    random      uniform numbers, drawn from a seed

Both give an Importance, so everything after them is the same code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.axes import Axis, AxisSizes, Outer, Stack, axis_sizes, size
from nanohybrid.model.spec import param_specs
from nanohybrid.prune.depth_units import depth_units
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.prunable import HIDDEN, layer_axes

Scores = dict[int | None, Tensor]
"""By layer, over the product of its prunable axes, and under None of the hidden size."""


def magnitude(checkpoint: Path) -> Importance:
    """Scores by the norms of weights, read tensor by tensor: one of them in fp32 is in memory."""
    with CheckpointReader(checkpoint) as reader:
        config, sizes = reader.config, axis_sizes(reader.config)
        squares = blank(config)
        for name, spec in param_specs(config).items():
            if len(spec.shape) < 2:
                continue  # the size of a gain, bias or decay does not tell how much it matters
            own = () if spec.layer is None else names_of(config, spec.layer)
            energy = reader.tensor(name, torch.float32).square()
            for dimension, axis in enumerate(spec.axes):
                others = [d for d in range(energy.ndim) if d != dimension]
                sums = energy.sum(others) if others else energy
                for key, axes in ((None, (HIDDEN,)), (spec.layer, own)):
                    entry = joint_owner(axis, sizes, axes)
                    owned = entry >= 0
                    if owned.any():
                        squares[key].view(-1).index_add_(0, entry[owned], sums[owned])
    return as_importance(config, {key: energy.sqrt() for key, energy in squares.items()}, {"by": "magnitude"})


def random(config: HybridConfig, seed: int) -> Importance:
    """Random scores, and a random order of the layers, or of the blocks that go together."""
    generator = torch.Generator().manual_seed(seed)
    scores: Scores = {
        key: torch.rand(zeros.shape, generator=generator, dtype=torch.float64).float()
        for key, zeros in blank(config).items()
    }
    units = depth_units(config)
    score_U = torch.rand(len(units.layers), generator=generator)
    order = [layer for unit in score_U.argsort().tolist() for layer in units.layers[unit]]
    found = as_importance(config, scores, {"by": "random", "seed": seed})
    return found.with_layers(score_U.repeat_interleave(units.size), order, unit_layers=units.size)


def names_of(config: HybridConfig, layer: int) -> tuple[str, ...]:
    """The axes of a layer's scores."""
    return tuple(one.axis for one in layer_axes(config.pattern[layer]))


def blank(config: HybridConfig) -> Scores:
    """Zeros for every entry of every prunable axis."""
    sizes = axis_sizes(config)
    table: Scores = {None: torch.zeros(config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        if names := names_of(config, layer):
            table[layer] = torch.zeros([sizes[name] for name in names])
    return table


def as_importance(config: HybridConfig, scores: Scores, facts: dict[str, object]) -> Importance:
    """A table as `blank` makes it, as an Importance."""
    own = {layer: table for layer, table in scores.items() if layer is not None}
    return Importance(scores[None], own, {layer: names_of(config, layer) for layer in own}, facts=facts)


def joint_owner(axis: Axis, sizes: AxisSizes, names: tuple[str, ...]) -> Tensor:
    """For each index along `axis`, the entry of the product of the axes `names` that it belongs to; -1 where
    to none."""
    total = torch.zeros(size(axis, sizes), dtype=torch.int64)
    missing = torch.full_like(total, not names, dtype=torch.bool)
    for name in names:
        entry = owner(axis, sizes, name)
        missing |= entry < 0
        total = total * sizes[name] + entry
    return torch.where(missing, -1, total)


def owner(axis: Axis, sizes: AxisSizes, name: str) -> Tensor:
    """For each index along `axis`, the entry of the axis `name` that it belongs to; -1 where it belongs to
    none."""
    if isinstance(axis, Stack):
        return torch.cat([owner(part, sizes, name) for part in axis.parts])
    if isinstance(axis, Outer):
        found = torch.full((1,), -1, dtype=torch.int64)
        for part in axis.parts:
            found = torch.maximum(found[:, None], owner(part, sizes, name)[None, :]).flatten()
        return found
    return torch.arange(sizes[name]) if axis == name else torch.full((size(axis, sizes),), -1)
