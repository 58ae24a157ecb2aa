"""Named axes: the language in which a mixer declares the shape of every parameter and cache tensor.

    "hidden_size"                                   one axis, named after the configuration field (or
    property) that is its size
    1                                               a fixed size Outer("mamba_num_heads", "mamba_head_dim")
    the flattened product of axes, the last one running fastest Stack(INNER, INNER, "mamba_num_heads")
    axes concatenated one after the other

From such a declaration follow shape checks, parameter counts, pruning slices and sharding plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class Outer:
    """The flattened product of axes: index (a, b) is a * size(b) + b."""

    parts: tuple[Axis, ...]

    def __init__(self, *parts: Axis) -> None:
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Stack:
    """Axes concatenated one after the other."""

    parts: tuple[Axis, ...]

    def __init__(self, *parts: Axis) -> None:
        object.__setattr__(self, "parts", parts)


Axis = str | int | Outer | Stack
Axes = tuple[Axis, ...]


class AxisSizes(dict[str, int]):
    """The size of every named axis under a configuration: the attribute of that name, read at first use."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._config = config

    def __missing__(self, axis: str) -> int:
        size = getattr(self._config, axis, None)
        if not isinstance(size, int):
            raise ConfigError(f'the axis "{axis}" is no field of the configuration: its size is unknown')
        value = self[axis] = size
        return value


def axis_sizes(config: Any) -> AxisSizes:
    """The size of every named axis under a configuration."""
    return AxisSizes(config)


def size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The number of entries of an axis."""
    if isinstance(axis, int):
        return axis
    if isinstance(axis, str):
        return sizes[axis]
    parts = [size(part, sizes) for part in axis.parts]
    return sum(parts) if isinstance(axis, Stack) else prod(parts)


def shape(axes: Axes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    return tuple(size(axis, sizes) for axis in axes)


def is_linear(name: str, axes: Axes) -> bool:
    """Whether a mixer's parameter of this checkpoint name is the weight of a linear, [out, in]: `X.weight` with two axes.

    Linears are quantized, packed, trained in FP8 and counted as matrix products. A kernel of a convolution has three axes,
    (channels, 1, width); any other matrix has a name of its own, without `.weight`.
    """
    path = name.split(".")
    return len(axes) == 2 and len(path) == 2 and path[1] == "weight"


def selected_index(
    axis: Axis, sizes: Mapping[str, int], selected: Mapping[str, Sequence[int] | Tensor]
) -> Tensor:
    """Indices along `axis` that remain when each named axis in `selected` keeps only the given entries.

    Returns int64 indices in the order of the axis. This is the one rule by which every parameter is pruned.
    """
    if isinstance(axis, int):
        return torch.arange(axis)
    if isinstance(axis, str):
        found = axis in selected
        return torch.as_tensor(selected[axis], dtype=torch.int64) if found else torch.arange(sizes[axis])
    if isinstance(axis, Stack):
        indices, offset = [], 0
        for part in axis.parts:
            indices.append(selected_index(part, sizes, selected) + offset)
            offset += size(part, sizes)
        return torch.cat(indices)
    index = torch.zeros(1, dtype=torch.int64)
    for part in axis.parts:
        inner = selected_index(part, sizes, selected)
        index = (index[:, None] * size(part, sizes) + inner[None, :]).flatten()
    return index


def names(axis: Axis) -> set[str]:
    """The named axes that occur in `axis`."""
    return set(ordered_names(axis))


def ordered_names(axis: Axis) -> list[str]:
    """The named axes that occur in `axis`, each once, in the order in which they are declared."""
    if isinstance(axis, int):
        return []
    found = [axis] if isinstance(axis, str) else [name for part in axis.parts for name in ordered_names(part)]
    return list(dict.fromkeys(found))
