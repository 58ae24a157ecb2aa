"""The registry of mixers: one character of the layer pattern for each kind of layer.

To add a kind, subclass Mixer in a file of its own and call `register` with it (examples/add_a_mixer.py).
Everything else reads the registry and the facts that the class declares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from nanohybrid.errors import ConfigError
from nanohybrid.model.mixers.attention import Attention, AttentionFields
from nanohybrid.model.mixers.base import Mixer
from nanohybrid.model.mixers.declarations import (
    CacheSpec,
    CpuKernel,
    InnerActivation,
    LayerFields,
    MixerSpec,
    PrunableAxis,
    width,
)
from nanohybrid.model.mixers.mamba2 import Mamba2, Mamba2Fields
from nanohybrid.model.mixers.mlp import MLP, MLPFields

__all__ = [
    "MIXERS",
    "MLP",
    "Attention",
    "AttentionFields",
    "CacheSpec",
    "CpuKernel",
    "InnerActivation",
    "LayerFields",
    "MLPFields",
    "Mamba2",
    "Mamba2Fields",
    "Mixer",
    "MixerSpec",
    "PrunableAxis",
    "field_names",
    "kinds",
    "known_kinds",
    "register",
    "width",
    "widths",
]

MIXERS: dict[str, type[Mixer[Any]]] = {}
"""The kinds of layers by their character in the layer pattern."""

Kind = TypeVar("Kind", bound=type[Mixer[Any]])


def register(mixer: Kind) -> Kind:
    """Make a kind of layer known under its `symbol`; usable as a class decorator.

    A class that is defined again, as in a notebook, replaces the one before it. Raises ConfigError where the class declares
    its facts incompletely or another class has its symbol.
    """
    name = mixer.__name__
    for fact in ("symbol", "label", "color"):
        if not isinstance(vars(mixer).get(fact), str):
            raise ConfigError(f"{name} declares no {fact} of its own: give it one")
    symbol = mixer.symbol
    if len(symbol) != 1 or not symbol.isprintable() or symbol.isspace():
        raise ConfigError(f"{name}.symbol is {symbol!r}: it must be one printable character")
    holder = MIXERS.get(symbol, mixer)
    if (holder.__module__, holder.__qualname__) != (mixer.__module__, mixer.__qualname__):
        taken_by = f"{holder.__module__}.{holder.__qualname__}"
        raise ConfigError(f"{name}.symbol is {symbol!r}, which is that of {taken_by}: choose another")
    if mixer.prunable and mixer.activation is None:
        raise ConfigError(f"{name} declares prunable axes and no activation to score them by: declare one")
    for other in MIXERS.values():
        if other not in (mixer, holder) and (taken := set(mixer.block_types) & set(other.block_types)):
            raise ConfigError(f"{name}.block_types names {sorted(taken)}, which are {other.__name__}'s")
    MIXERS[symbol] = mixer
    return mixer


def kinds(pattern: Iterable[str]) -> Iterator[type[Mixer[Any]]]:
    """The kinds of layers that a pattern uses, each once, in the order of the registry."""
    used = set(pattern)
    return (mixer for symbol, mixer in MIXERS.items() if symbol in used)


def known_kinds() -> str:
    """The registered kinds in words, for error messages: "M (Mamba-2), * (attention), - (MLP)"."""
    return ", ".join(f"{symbol} ({mixer.label})" for symbol, mixer in MIXERS.items())


def field_names(mixer: type[Mixer[Any]]) -> list[str]:
    """The configuration fields that a kind reads beside those of every layer."""
    common = {field.name for field in fields(LayerFields)}
    return [field.name for field in fields(mixer.fields) if field.name not in common]


def widths(mixer: type[Mixer[Any]]) -> list[str]:
    """The fields of a kind that a checkpoint must state, since a default would be a guess at a tensor's shape."""
    return [field.name for field in fields(mixer.fields) if field.metadata.get("width")]


register(Mamba2)
register(Attention)
register(MLP)
