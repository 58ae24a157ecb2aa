"""What every parameter and state of a whole model is, from the layers' own declarations: no weights needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.model.mixers import attention, mamba2, mlp
from nanohybrid.model.mixers.axes import Axes, StateSpec, axis_sizes, shape
from nanohybrid.model.mixers.base import Mixer

MIXERS: dict[str, type[Mixer]] = {MAMBA: mamba2.Mamba2, ATTENTION: attention.Attention, MLP: mlp.MLP}


@dataclass(frozen=True)
class Declared:
    """One parameter: its axes, its shape, and the layer it belongs to (None: embeddings, final norm, head)."""

    axes: Axes
    shape: tuple[int, ...]
    layer: int | None
    part: str  # "embedding", "head", "norm", or the pattern's character


def parameters(config: HybridConfig) -> dict[str, Declared]:
    """Every parameter by its official checkpoint name, in the order of the forward pass."""
    sizes = axis_sizes(config)
    table: dict[str, Declared] = {}

    def add(name: str, axes: Axes, layer: int | None, part: str) -> None:
        table[name] = Declared(axes, shape(axes, sizes), layer, part)

    add("backbone.embeddings.weight", ("vocab", "embedding"), None, "embedding")
    for index, kind in enumerate(config.pattern):
        add(f"backbone.layers.{index}.norm.weight", ("embedding",), index, kind)
        for name, axes in MIXERS[kind].declare(config).parameters.items():
            add(f"backbone.layers.{index}.mixer.{name}", axes, index, kind)
    add("backbone.norm_f.weight", ("embedding",), None, "norm")
    if not config.tie_word_embeddings:
        add("lm_head.weight", ("vocab", "embedding"), None, "head")
    return table


# how states, and keys and values, may be kept, by the names of the flags; None is as the layer declares it
STATE_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16}
KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "fp8": torch.float8_e4m3fn}


def known(name: str, table: Mapping[str, object], what: str) -> str:
    """The name itself. Raises InputError where the table has no such one."""
    if name not in table:
        raise InputError(f"{what} is {name!r}; it must be one of {', '.join(table)}")
    return name


@dataclass(frozen=True)
class Kept:
    """One thing that a layer remembers, as it is stored: for each sequence, or for each token of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_token: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def kept(
    config: HybridConfig,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
) -> list[dict[str, Kept]]:
    """What each layer stores, by name, where activations are in `dtype`.

    state_dtype: of the recurrence, which declares fp32; rounded stochastically where it is fp16. kv_dtype: of keys and values;
    float8_e4m3fn brings a bf16 scale for each token and head, `NAME_scale`.
    """
    sizes = axis_sizes(config)
    table: list[dict[str, Kept]] = []
    for declared in states(config):
        layer: dict[str, Kept] = {}
        for name, spec in declared.items():
            wanted = kv_dtype if spec.per_token else state_dtype if spec.dtype is not None else None
            layer[name] = Kept(shape(spec.axes, sizes), wanted or spec.kind(dtype), spec.per_token)
            if spec.per_token and kv_dtype == torch.float8_e4m3fn:
                layer[f"{name}_scale"] = Kept(shape(spec.axes[:-1], sizes), torch.bfloat16, per_token=True)
        table.append(layer)
    return table


def states(config: HybridConfig) -> list[dict[str, StateSpec]]:
    """What each layer remembers, by name."""
    return [dict(MIXERS[kind].declare(config).states) for kind in config.pattern]
