"""The sizes that a pruned model should have, and the selection of the most important entries that gives
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nanohybrid.config import OWN_FIELDS, HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.prune import old_layout
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.prunable import (
    HIDDEN,
    group_count,
    known_axes,
    layers_with,
    own_axis,
    prunable_axes,
    unit_of,
)
from nanohybrid.prune.selection import Indices, Selection, check_followers


@dataclass(frozen=True)
class Target:
    """What to prune a model to.

    layers: how many remain; drop_layers: which ones go, by their number from 0; not both. sizes: axis ->
    entries that remain, as {"intermediate_size": 1024}; an axis that is not named stays whole.
    """

    layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    RENAMED: ClassVar[dict[str, str]] = old_layout.TARGET_KEYS

    @property
    def needs_scores(self) -> bool:
        """Whether importance decides what goes."""
        return self.layers is not None or bool(self.sizes)

    def size_of(self, axis: str, base: HybridConfig) -> int:
        """The size of an axis after pruning `base`."""
        return self.sizes.get(axis) or int(getattr(base, axis))

    def check(self, base: HybridConfig) -> None:
        """Raise InputError, in one line with the nearest possible, where a model of shape `base` cannot be
        pruned to this."""
        count = base.num_hidden_layers
        if self.layers is not None and self.drop_layers:
            raise InputError("--layers and --drop-layers contradict each other: give one of the two")
        for layer in self.drop_layers:
            if not 0 <= layer < count:
                raise InputError(f"--drop-layers {layer}: there is no such layer, they are 0 to {count - 1}")
        if len(set(self.drop_layers)) >= count:
            raise InputError(f"--drop-layers names all {count} layers: at least one must remain")
        _check_size("--layers", self.layers, count)
        axes, known = prunable_axes(base.pattern), known_axes()
        for name, wanted in self.sizes.items():
            if name not in known:
                raise InputError(f"{name} is no axis that can be pruned: known are {', '.join(known)}")
            if name not in axes:
                raise InputError(
                    f"{known[name].flag} {wanted}: this model has no such layers (its pattern is "
                    f"{base.pattern}); "
                    "leave the flag out"
                )
            _check_size(known[name].flag, wanted, getattr(base, name), *unit_of(base, name))
            if wanted < getattr(base, name):
                check_followers(base, name)

    def select(self, base: HybridConfig, importance: Importance | None) -> Selection:
        """The entries of `base` that remain. importance: may be None where only named layers go.

        Raises InputError where the target is impossible, or needs scores and there are none.
        """
        self.check(base)
        if importance is None:
            if self.needs_scores:
                raise InputError(
                    "what to remove is chosen by importance: give --importance FILE, or "
                    "--calibration to measure it"
                )
            return Selection.everything(base).restricted_to(self._layers(base, None), base)
        importance.check(base)
        layers = self._layers(base, importance)
        axes = prunable_axes(base.pattern)
        shared = {
            name: best(importance.of_shared(name), self.size_of(name, base))
            for name, one in axes.items()
            if one.shared
        }
        selected: dict[str, dict[int | None, Indices]] = {}
        for name, one in axes.items():
            own = layers_with(base.pattern, name, layers)
            if one.shared and (own or name == HIDDEN):
                selected[name] = {None: shared[name]}
            elif own:
                selected[name] = {
                    layer: self._in_layer(base, importance, layer, name, shared) for layer in own
                }
        return Selection(layers, selected)

    def config(self, base: HybridConfig, importance: Importance | None) -> HybridConfig:
        """The shape of what remains, without choosing entries; `importance` ranks layers where their number
        is given."""
        self.check(base)
        pattern = "".join(base.pattern[layer] for layer in self._layers(base, importance))
        known = prunable_axes(pattern).keys() | OWN_FIELDS  # a field of a kind that is gone goes with it
        return base.replace(pattern=pattern, **{n: size for n, size in self.sizes.items() if n in known})

    def _in_layer(
        self, base: HybridConfig, importance: Importance, layer: int, name: str, shared: Mapping[str, Indices]
    ) -> Indices:
        axis = own_axis(base.pattern, layer, name)
        groups = 1 if axis is None else group_count(base, axis)
        return best(importance.of_layer(layer, name, shared), self.size_of(name, base), groups)

    def _layers(self, base: HybridConfig, importance: Importance | None) -> Indices:
        gone = set(self.drop_layers)
        if self.layers is not None and self.layers < base.num_hidden_layers:
            if importance is None or len(importance.order) != base.num_hidden_layers:
                raise InputError(
                    "the importance scores hold no ranking of layers: measure them with "
                    "--calibration, or use --drop-layers"
                )
            unit, wanted = importance.facts.get("unit_layers", 1), base.num_hidden_layers - self.layers
            if wanted % unit:
                raise InputError(
                    f"--layers {self.layers}: this model loses whole blocks of {unit} layers, so that other "
                    f"programs read it: nearest {self.layers - 1} or {self.layers + 1}; --depth-unit layer "
                    "ranks single layers"
                )
            gone = set(importance.order[:wanted])
        return tuple(layer for layer in range(base.num_hidden_layers) if layer not in gone)


def sizes_of(config: HybridConfig) -> dict[str, int]:
    """The size of each prunable axis of a model."""
    return {name: int(getattr(config, name)) for name in prunable_axes(config.pattern)}


def best(scores: Tensor, keep: int, groups: int = 1) -> Indices:
    """The `keep` highest scores, as many in each of `groups` equal runs; ascending indices. The first of
    equals wins."""
    size = len(scores) // groups
    chosen: list[int] = []
    for group in range(groups):
        order = torch.argsort(
            scores[group * size : (group + 1) * size].double(), descending=True, stable=True
        )
        chosen += [group * size + int(i) for i in order[: keep // groups]]
    return tuple(sorted(chosen))


def _check_size(flag: str, wanted: int | None, most: int, unit: int = 1, groups: str = "") -> None:
    if wanted is None:
        return
    if not unit <= wanted <= most:
        nearest = max(unit, min(wanted, most))
        raise InputError(
            f"{flag} {wanted}: the model has {most}, possible are {unit} to {most}; nearest {nearest}"
        )
    if wanted % unit:
        below = wanted // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        raise InputError(
            f"{flag} {wanted}: each of the groups ({groups} = {unit}) must keep as many, so it must "
            f"be a multiple of {unit}; "
            f"nearest {near}"
        )
