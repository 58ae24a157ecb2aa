"""The grammar in which a layer declares its parameters: every dimension is a named axis, or made of named axes.

    "embedding"                                     one axis
    Outer("mamba_heads", "mamba_channels")          their product, flattened with the last running fastest
    Stack(INNER, INNER, "mamba_heads")              one after the other

From such a table come shape checks, counts, pruning slices and sharding plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig


@dataclass(frozen=True)
class Outer:
    """The product of axes: index (a, b) stands at a * size(b) + b."""

    parts: tuple[Axis, ...]

    def __init__(self, *parts: Axis) -> None:
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Stack:
    """Axes one after the other."""

    parts: tuple[Axis, ...]

    def __init__(self, *parts: Axis) -> None:
        object.__setattr__(self, "parts", parts)


Axis = str | Outer | Stack
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class StateSpec:
    """What a layer remembers: one tensor of these axes for each sequence, or for each token of context."""

    axes: Axes
    per_token: bool
    dtype: torch.dtype | None  # None: that of the activations

    def kind(self, activations: torch.dtype) -> torch.dtype:
        """The dtype it is kept in: never narrower than declared, and float64 where all is float64."""
        return activations if self.dtype is None else torch.promote_types(self.dtype, activations)


@dataclass(frozen=True)
class Declaration:
    """All that others need to know about a layer: its parameters' axes by name, and its state."""

    parameters: Mapping[str, Axes]
    states: Mapping[str, StateSpec]


def axis_sizes(config: HybridConfig) -> dict[str, int]:
    """The size of every named axis under a configuration."""
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "embedding": config.hidden_size,
        "ffn": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "attention_channels": config.head_dim,
        "mamba_heads": config.mamba_num_heads,
        "mamba_channels": config.mamba_head_dim,
        "groups": config.n_groups,
        "ssm_state": config.ssm_state_size,
        "conv_window": config.conv_kernel,
        "conv_context": config.conv_kernel - 1,
    }


def size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """How many entries an axis has."""
    if isinstance(axis, str):
        return sizes[axis]
    parts = [size(part, sizes) for part in axis.parts]
    if isinstance(axis, Stack):
        return sum(parts)
    product = 1
    for part in parts:
        product *= part
    return product


def shape(axes: Axes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    return tuple(size(axis, sizes) for axis in axes)


def kept_index(axis: Axis, sizes: Mapping[str, int], kept: Mapping[str, Sequence[int] | Tensor]) -> Tensor:
    """Indices along `axis` that remain when the named axes in `kept` keep only the given entries; int64, in axis order.

    The one rule by which every parameter of every layer is pruned.
    """
    if isinstance(axis, str):
        return torch.as_tensor(kept[axis], dtype=torch.int64) if axis in kept else torch.arange(sizes[axis])
    if isinstance(axis, Stack):
        indices, offset = [], 0
        for part in axis.parts:
            indices.append(kept_index(part, sizes, kept) + offset)
            offset += size(part, sizes)
        return torch.cat(indices)
    index = torch.zeros(1, dtype=torch.int64)
    for part in axis.parts:
        index = (index[:, None] * size(part, sizes) + kept_index(part, sizes, kept)[None, :]).flatten()
    return index


def names(axis: Axis) -> set[str]:
    """The named axes that occur in `axis`."""
    return {axis} if isinstance(axis, str) else set().union(*(names(part) for part in axis.parts))
