"""What every parameter and every cache tensor of a whole model is, from what the mixers declare.

No weights are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.model.mixers import MIXERS
from nanohybrid.model.mixers.axes import Axes, axis_sizes, shape

DRAFT_ROWS = 64
"""Rows that a window's ring has beside the window: draft tokens may be written there and rejected."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its axes, its shape, and the layer it belongs to (None: embeddings, final norm, head)."""

    axes: Axes
    shape: tuple[int, ...]
    layer: int | None
    part: str  # "embedding", "head", "norm", or the symbol of the layer's kind


def param_specs(config: HybridConfig) -> dict[str, ParamSpec]:
    """Every parameter by its official checkpoint name, in the order of the forward pass."""
    sizes = axis_sizes(config)
    table: dict[str, ParamSpec] = {}

    def add(name: str, axes: Axes, layer: int | None, part: str) -> None:
        table[name] = ParamSpec(axes, shape(axes, sizes), layer, part)

    add("backbone.embeddings.weight", ("vocab_size", "hidden_size"), None, "embedding")
    for index, kind in enumerate(config.pattern):
        add(f"backbone.layers.{index}.norm.weight", ("hidden_size",), index, kind)
        for name, axes in MIXERS[kind].declare(config).parameters.items():
            add(f"backbone.layers.{index}.mixer.{name}", axes, index, kind)
    add("backbone.norm_f.weight", ("hidden_size",), None, "norm")
    if not config.tie_word_embeddings:
        add("lm_head.weight", ("vocab_size", "hidden_size"), None, "head")
    return table


def part_label(part: str) -> str:
    """What `ParamSpec.part` is called in tables: the label of a layer's kind, else the part itself."""
    return MIXERS[part].label if part in MIXERS else part


# how recurrent states, and keys and values, may be stored, by the values of the flags; None is as the mixer
# declares it
STATE_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16}
KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "fp8": torch.float8_e4m3fn}


def known(name: str, table: Mapping[str, object], what: str) -> str:
    """The name itself. Raises InputError where the table lacks it."""
    if name not in table:
        raise InputError(f"{what} is {name!r}; it must be one of {', '.join(table)}")
    return name


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a layer's cache as it is stored: for each sequence, or for each token of it.

    shape: of one sequence where kind is recurrent, of one token where it is paged; of a window, [ring length,
    ...] of one sequence.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["recurrent", "paged", "window"]
    rounded: bool = False
    """Whether it is a state that is declared in fp32 and stored in fp16."""

    @property
    def per_token(self) -> bool:
        """Whether it grows with every token of the context."""
        return self.kind == "paged"

    @property
    def bytes(self) -> int:
        """Bytes for each token where it is paged, else for each sequence."""
        return math.prod(self.shape) * self.dtype.itemsize


def cache_specs(
    config: HybridConfig,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
) -> list[dict[str, CacheTensor]]:
    """What each layer stores between calls, by name, where activations are in `dtype`.

    state_dtype: of recurrent states that are declared in fp32; fp16 is rounded stochastically. kv_dtype: of
    paged and windowed rows; float8_e4m3fn adds `NAME_scale`, a bf16 scale for each token and head.
    """
    sizes = axis_sizes(config)
    table: list[dict[str, CacheTensor]] = []
    for kind in config.pattern:
        layer: dict[str, CacheTensor] = {}
        for name, spec in MIXERS[kind].declare(config).cache.items():
            ring = (spec.window + DRAFT_ROWS,) if spec.kind == "window" else ()
            rows = spec.kind != "recurrent"
            wanted = kv_dtype if rows else state_dtype if spec.dtype is not None else None
            one = shape(spec.axes, sizes)
            stored = wanted or spec.stored_dtype(dtype)
            rounded = not rows and spec.dtype == torch.float32 and stored == torch.float16
            layer[name] = CacheTensor((*ring, *one), stored, spec.kind, rounded)
            if rows and kv_dtype == torch.float8_e4m3fn:
                layer[f"{name}_scale"] = CacheTensor((*ring, *one[:-1]), torch.bfloat16, spec.kind)
        table.append(layer)
    return table
