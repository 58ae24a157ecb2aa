"""Which entries of each axis a pruned model has of its base model, as a value and as `pruning_mask.json`.

This is all that slicing reads. All numbers are the base model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write
from nanohybrid.model.mixers import MIXERS
from nanohybrid.prune import old_layout
from nanohybrid.prune.prunable import (
    HIDDEN,
    followers,
    group_count,
    layers_with,
    own_axis,
    prunable_axes,
)

FILE = "pruning_mask.json"
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """The layers that remain, and the entries of each axis that remain, both ascending.

    axes: axis -> layer -> indices. An axis with one selection for all layers, as the hidden size, has it
    under None; any other has one for each remaining layer of the kinds that prune it.
    """

    layers: Indices
    axes: Mapping[str, Mapping[int | None, Indices]]

    @classmethod
    def everything(cls, config: HybridConfig) -> Selection:
        """The whole model."""
        layers = _range(config.num_hidden_layers)
        axes = {
            name: dict.fromkeys(_keys(config, name, layers), _range(getattr(config, name)))
            for name in prunable_axes(config.pattern)
        }
        return cls(layers, axes)

    def restricted_to(self, layers: Sequence[int], config: HybridConfig) -> Selection:
        """The same entries in fewer layers."""
        axes = {
            name: {key: of for key, of in found.items() if key in _keys(config, name, layers)}
            for name, found in self.axes.items()
        }
        return Selection(tuple(layers), {name: found for name, found in axes.items() if found})

    @property
    def hidden(self) -> Indices:
        """The channels of the hidden size that remain."""
        return self.axes[HIDDEN][None]

    def of(self, layer: int | None) -> dict[str, Indices]:
        """What remains of each axis (model/mixers/axes.py) in one layer, or (None) outside the layers."""
        shared = {name: found[None] for name, found in self.axes.items() if None in found}
        if layer is None:
            return {HIDDEN: shared[HIDDEN]}
        return shared | {name: found[layer] for name, found in self.axes.items() if layer in found}

    def config(self, base: HybridConfig) -> HybridConfig:
        """The configuration of what remains of `base`. Raises InputError where these indices cannot be of
        it."""
        _check(self, base)
        sizes = {name: len(next(iter(found.values()))) for name, found in self.axes.items() if found}
        return base.replace(pattern="".join(base.pattern[layer] for layer in self.layers), **sizes)

    def write(self, directory: Path) -> Path:
        """Write `pruning_mask.json`, and `kept.json`, its deprecated form (old_layout.py)."""
        path = directory / FILE
        atomic_write(path, json.dumps(self.as_json()) + "\n")
        if (row := old_layout.selection_row(self.layers, self.axes)) is not None:
            atomic_write(directory / old_layout.FILE, json.dumps(row) + "\n")
        return path

    def as_json(self) -> dict[str, Any]:
        """`layers`, and `axes`: a list where all layers share a selection, else an object with a list for
        each layer."""
        axes = {
            name: list(found[None]) if None in found else {str(k): list(v) for k, v in found.items()}
            for name, found in self.axes.items()
        }
        return {"layers": list(self.layers), "axes": axes}

    @classmethod
    def read(cls, path: Path) -> Selection:
        """Read a file, or `pruning_mask.json` of a directory, or its `kept.json` with a warning where it has
        no other.

        Raises InputError where it cannot be read.
        """
        file = file_in(path) or path / FILE if path.is_dir() else path
        try:
            row = json.loads(file.read_text())
            if "axes" not in row:
                old_layout.warn(file, FILE)
                row = old_layout.selection_from(row)
            axes = {name: _by_layer(found) for name, found in row["axes"].items()}
            return cls(tuple(row["layers"]), axes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a pruning mask ({type(error).__name__}: {error})") from None


def file_in(directory: Path) -> Path | None:
    """The pruning mask of a checkpoint, under its current or its old name; None where it has none."""
    found = (directory / name for name in (FILE, old_layout.FILE))
    return next((file for file in found if file.is_file()), None)


def copy_mask(source: Path, directory: Path, replace: bool = False) -> None:
    """Copy the pruning mask of a checkpoint, in all forms that it has. replace: also where the directory has
    one."""
    for name in (FILE, old_layout.FILE):
        if (source / name).is_file() and (replace or not (directory / name).is_file()):
            atomic_write(directory / name, (source / name).read_bytes())


def _by_layer(found: Mapping[str, Sequence[int]] | Sequence[int]) -> dict[int | None, Indices]:
    """The indices of an axis in a file: an object by layer, or one list for all."""
    if isinstance(found, Mapping):
        return {int(layer): tuple(indices) for layer, indices in found.items()}
    return {None: tuple(found)}


def _range(size: int) -> Indices:
    return tuple(range(size))


def _keys(config: HybridConfig, axis: str, layers: Sequence[int]) -> list[int | None]:
    """Where a selection of these layers has indices of an axis: None where they share them."""
    if axis == HIDDEN:
        return [None]
    own = layers_with(config.pattern, axis, layers)
    shared = own and prunable_axes(config.pattern)[axis].shared
    return [None] if shared else [*own]


def _check(selection: Selection, base: HybridConfig) -> None:
    _check_indices("layers", selection.layers, base.num_hidden_layers)
    known = prunable_axes(base.pattern)
    if unknown := sorted(set(selection.axes) - set(known)):
        raise InputError(f"the selection names {unknown[0]}, the axes of this model are {', '.join(known)}")
    for name in known:
        found, wanted = selection.axes.get(name, {}), _keys(base, name, selection.layers)
        if list(found) != wanted:
            raise InputError(
                f"the selection of {name} is of layers {list(found)}, it must be of {wanted} (None: "
                "one for all)"
            )
        for layer, indices in found.items():
            _check_indices(
                name if layer is None else f"{name} in layer {layer}", indices, getattr(base, name)
            )
            if layer is not None:
                _check_groups(base, layer, name, indices)
        if len({len(indices) for indices in found.values()}) > 1:
            raise InputError(
                f"the selection of {name} has unequal numbers in different layers: a configuration "
                "has one number"
            )
        if found and len(next(iter(found.values()))) < getattr(base, name):
            check_followers(base, name)


def _check_indices(name: str, indices: Sequence[int], size: int) -> None:
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise InputError(
            f"the selection of {name} must be ascending numbers from 0 to {size - 1}, at least one"
        )


def _check_groups(base: HybridConfig, layer: int, name: str, indices: Indices) -> None:
    axis = own_axis(base.pattern, layer, name)
    groups, size = 1 if axis is None else group_count(base, axis), getattr(base, name)
    if len({sum(i * groups // size == group for i in indices) for group in range(groups)}) > 1:
        raise InputError(
            f"the selection of {name} in layer {layer} has unequal numbers in the {groups} groups: "
            "give each as many"
        )


def check_followers(base: HybridConfig, axis: str) -> None:
    """Raise InputError where layers have an axis that is to be shortened and do not prune it."""
    for kind in () if axis == HIDDEN else followers(base, axis):
        raise InputError(
            f"{axis} cannot be pruned in this model: its layers {kind} ({MIXERS[kind].label}) have "
            "this axis and do not prune it"
        )
