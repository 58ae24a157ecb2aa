"""What importance is to be compared with: the size of weights, and chance. Neither needs a document.

    magnitude   of each entry of an axis the L2 norm of all weights that write or read it, over the whole model for embedding channels
    random      uniform numbers, drawn from a seed

Both give scores of the same form as importance by activations, so that everything after them is the same code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.model.mixers.axes import Axis, Outer, Stack, axis_sizes, size
from nanohybrid.model.spec import param_specs
from nanohybrid.prune.importance import Importance

OWNERS = {MLP: ("ffn",), MAMBA: ("mamba_heads", "mamba_channels"), ATTENTION: ("attention_heads",)}


def magnitude(checkpoint: Path) -> Importance:
    """Scores by the norms of weights, read tensor by tensor: one of them in fp32 is in memory."""
    with CheckpointReader(checkpoint) as reader:
        config, sizes = reader.config, axis_sizes(reader.config)
        squares = blank(config)
        for name, declared in param_specs(config).items():
            if len(declared.shape) < 2:
                continue  # gains, biases and decays: their size says nothing of how much they matter
            energy = reader.tensor(name, torch.float32).square()
            for dimension, axis in enumerate(declared.axes):
                others = [d for d in range(energy.ndim) if d != dimension]
                sums = energy.sum(others) if others else energy
                for key, axes in ((None, ("embedding",)), (declared.layer, OWNERS.get(declared.part, ()))):
                    entry = joint_owner(axis, sizes, axes)
                    owned = entry >= 0
                    if owned.any():
                        squares[key].view(-1).index_add_(0, entry[owned], sums[owned])
    return as_importance(config, {key: energy.sqrt() for key, energy in squares.items()}, {"by": "magnitude"})


def random(config: HybridConfig, seed: int) -> Importance:
    """Scores by chance; the order in which layers would go is by chance too."""
    generator = torch.Generator().manual_seed(seed)
    scores: dict[int | None, Tensor] = {
        key: torch.rand(shape.shape, generator=generator, dtype=torch.float64).float()
        for key, shape in blank(config).items()
    }
    layers = torch.rand(config.num_hidden_layers, generator=generator)
    found = as_importance(config, scores, {"by": "random", "seed": seed})
    return found.with_layers(layers, layers.argsort().tolist())


def blank(config: HybridConfig) -> dict[int | None, Tensor]:
    """Zeros for every entry of every axis: by layer, and of embedding channels under None."""
    sizes = axis_sizes(config)
    table: dict[int | None, Tensor] = {None: torch.zeros(config.hidden_size)}
    for layer, kind in enumerate(config.pattern):
        table[layer] = torch.zeros([sizes[name] for name in OWNERS[kind]])
    return table


def as_importance(
    config: HybridConfig, scores: dict[int | None, Tensor], facts: dict[str, object]
) -> Importance:
    """A table as `blank` makes it, as scores."""
    tables = {
        kind: {layer: scores[layer] for layer, each in enumerate(config.pattern) if each == kind}
        for kind in (MLP, MAMBA, ATTENTION)
    }
    return Importance(scores[None], tables[MLP], tables[MAMBA], tables[ATTENTION], facts=facts)


def joint_owner(axis: Axis, sizes: dict[str, int], names: tuple[str, ...]) -> Tensor:
    """For each index along `axis` the entry of the product of the axes `names` that it belongs to; -1 where to none of that product."""
    total = torch.zeros(size(axis, sizes), dtype=torch.int64)
    missing = torch.full_like(total, not names, dtype=torch.bool)
    for name in names:
        entry = owner(axis, sizes, name)
        missing |= entry < 0
        total = total * sizes[name] + entry
    return torch.where(missing, -1, total)


def owner(axis: Axis, sizes: dict[str, int], name: str) -> Tensor:
    """For each index along `axis` the entry of the axis `name` that it belongs to; -1 where it belongs to none."""
    if isinstance(axis, Stack):
        return torch.cat([owner(part, sizes, name) for part in axis.parts])
    if isinstance(axis, Outer):
        found = torch.full((1,), -1, dtype=torch.int64)
        for part in axis.parts:
            found = torch.maximum(found[:, None], owner(part, sizes, name)[None, :]).flatten()
        return found
    return torch.arange(sizes[axis]) if axis == name else torch.full((sizes[axis],), -1, dtype=torch.int64)
