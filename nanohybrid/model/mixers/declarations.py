"""Types of a mixer's declarations: configuration fields, caches, prunable axes, activations, CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nanohybrid.model.mixers.axes import Axes


@dataclass(frozen=True, kw_only=True)
class LayerFields:
    """The configuration fields that every layer reads, under the names of the official `config.json`."""

    hidden_size: int
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02


def width(default: int | None = None) -> Any:
    """A configuration field that sets a tensor's shape. A checkpoint must state it, even if it has a default."""
    if default is None:
        return field(metadata={"width": True})
    return field(default=default, metadata={"width": True})


@dataclass(frozen=True)
class CacheSpec:
    """One tensor that a layer keeps between calls, for each sequence.

    recurrent: one tensor of these axes for each sequence.
    paged:     one row of these axes for each token, in pages.
    window:    one row of these axes for each of the last `window` tokens, in a ring.
    """

    axes: Axes
    kind: Literal["recurrent", "paged", "window"]
    dtype: torch.dtype | None = None
    """None: the dtype of the activations."""
    window: int = 0
    """Tokens that a ring of kind "window" must hold."""

    def stored_dtype(self, activations: torch.dtype) -> torch.dtype:
        """The dtype it is stored in: never narrower than declared, and float64 where all is float64."""
        return activations if self.dtype is None else torch.promote_types(self.dtype, activations)


@dataclass(frozen=True)
class PrunableAxis:
    """An axis of which pruning may remove entries.

    axis: its name, which is also the configuration field of its size. flag: the option of `nanohybrid prune`
    that sets it. label: what its entries are called. groups: the field that says how many equal groups the
    entries form; as many remain in each. shared: one selection for all layers, else one for each layer.
    multiple: sizes that a search proposes are multiples of 8 where this is set. fractions: of the size, those that the search
    of `compress` tries where a recipe does not name others.
    """

    axis: str
    flag: str
    label: str
    groups: str | None = None
    shared: bool = False
    multiple: bool = False
    fractions: tuple[float, ...] = (1.0, 0.875, 0.75)


@dataclass(frozen=True)
class InnerActivation:
    """Where the activations are observed that score a layer's prunable axes (paper, section 4.1).

    module: the submodule; side: its input or its output; columns: of a wide output, the columns (start, stop)
    under a configuration. axes: the named axes whose product the columns are. writer: the linear that reads
    these activations and writes the layer's output; its column norms weight the scores.
    """

    module: str
    side: Literal["input", "output"]
    axes: tuple[str, ...]
    writer: str
    columns: Callable[[Any], tuple[int, int]] | None = None


@dataclass(frozen=True)
class MixerSpec:
    """The tensors of a layer: the axes of its parameters by checkpoint name, and its cache."""

    parameters: Mapping[str, Axes]
    cache: Mapping[str, CacheSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class CpuKernel:
    """How the CPU executor computes a layer (executors/cpu/forward.py).

    name: the kernel. linears: names of the linears it multiplies by, in its order. cache: names of the cache
    tensors it updates. vectors: fp32 vectors that it reads, None where it reads none.
    """

    name: str
    linears: tuple[str, ...]
    cache: tuple[str, ...] = ()
    vectors: tuple[Tensor | None, ...] = ()
