"""What a pruned model keeps of its parent, as a value and as `kept.json`: the only thing that says how to slice.

All numbers are the parent's. A layer that is dropped has no entry in the tables by layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.errors import InputError

FILE = "kept.json"
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """Indices that remain, ascending: layers, embedding channels, and by layer FFN neurons, Mamba heads and attention heads;
    channels of a Mamba head are the same in every head of every layer.
    """

    layers: Indices
    hidden: Indices
    ffn: Mapping[int, Indices]
    mamba_heads: Mapping[int, Indices]
    mamba_channels: Indices
    attention_heads: Mapping[int, Indices]

    @classmethod
    def everything(cls, config: HybridConfig) -> Kept:
        """The parent itself."""
        at = {
            kind: [i for i, k in enumerate(config.pattern) if k == kind] for kind in (MAMBA, ATTENTION, MLP)
        }
        return cls(
            layers=_range(config.num_hidden_layers),
            hidden=_range(config.hidden_size),
            ffn={i: _range(config.intermediate_size) for i in at[MLP]},
            mamba_heads={i: _range(config.mamba_num_heads) for i in at[MAMBA]},
            mamba_channels=_range(config.mamba_head_dim) if at[MAMBA] else (),
            attention_heads={i: _range(config.num_attention_heads) for i in at[ATTENTION]},
        )

    def axes(self, layer: int | None) -> dict[str, Sequence[int]]:
        """What remains of the named axes (model/mixers/axes.py) in one layer, or outside the layers."""
        named: dict[str, Sequence[int]] = {"embedding": self.hidden}
        if layer is None:
            return named
        if layer in self.ffn:
            named["ffn"] = self.ffn[layer]
        if layer in self.mamba_heads:
            named |= {"mamba_heads": self.mamba_heads[layer], "mamba_channels": self.mamba_channels}
        if layer in self.attention_heads:
            named["attention_heads"] = self.attention_heads[layer]
        return named

    def config(self, parent: HybridConfig) -> HybridConfig:
        """The configuration of what remains. Raises InputError where these indices cannot be of `parent`."""
        _check(self, parent)
        changes: dict[str, Any] = {
            "pattern": "".join(parent.pattern[i] for i in self.layers),
            "hidden_size": len(self.hidden),
        }
        for name, table in (
            ("intermediate_size", self.ffn),
            ("mamba_num_heads", self.mamba_heads),
            ("num_attention_heads", self.attention_heads),
        ):
            if table:
                changes[name] = len(next(iter(table.values())))
        if self.mamba_heads:
            changes["mamba_head_dim"] = len(self.mamba_channels)
        return parent.replace(**changes)

    def write(self, directory: Path) -> Path:
        """Write `kept.json`."""
        path = directory / FILE
        path.write_text(json.dumps(self.as_json()) + "\n")
        return path

    def as_json(self) -> dict[str, Any]:
        tables = {
            name: {str(k): list(v) for k, v in getattr(self, name).items()}
            for name in ("ffn", "mamba_heads", "attention_heads")
        }
        lists = {name: list(getattr(self, name)) for name in ("layers", "hidden", "mamba_channels")}
        names = ("layers", "hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads")
        return {name: lists.get(name, tables.get(name)) for name in names}

    @classmethod
    def read(cls, path: Path) -> Kept:
        """Read `kept.json`, given as file or directory."""
        file = path / FILE if path.is_dir() else path
        try:
            row = json.loads(file.read_text())
            tables = {
                name: {int(k): tuple(v) for k, v in row[name].items()}
                for name in ("ffn", "mamba_heads", "attention_heads")
            }
            return cls(
                tuple(row["layers"]),
                tuple(row["hidden"]),
                mamba_channels=tuple(row["mamba_channels"]),
                **tables,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: not a list of what was kept ({type(error).__name__}: {error})"
            ) from None


def _range(size: int) -> Indices:
    return tuple(range(size))


def _check(kept: Kept, parent: HybridConfig) -> None:
    _check_indices("layers", kept.layers, parent.num_hidden_layers)
    _check_indices("hidden", kept.hidden, parent.hidden_size)
    for name, table, kind, size, groups in (
        ("ffn", kept.ffn, MLP, parent.intermediate_size, 1),
        ("mamba_heads", kept.mamba_heads, MAMBA, parent.mamba_num_heads, parent.n_groups),
        (
            "attention_heads",
            kept.attention_heads,
            ATTENTION,
            parent.num_attention_heads,
            parent.num_key_value_heads,
        ),
    ):
        wanted = [i for i in kept.layers if parent.pattern[i] == kind]
        if list(table) != wanted:
            raise InputError(
                f"kept.{name} names layers {list(table)}, the kept ones of its kind are {wanted}"
            )
        for layer, indices in table.items():
            _check_indices(f"{name}.{layer}", indices, size)
            each = {sum(i * groups // size == group for i in indices) for group in range(groups)}
            if len(each) > 1:
                raise InputError(
                    f"kept.{name}.{layer} keeps unequal numbers in the {groups} groups: keep as many in each"
                )
        if len({len(indices) for indices in table.values()}) > 1:
            raise InputError(
                f"kept.{name} keeps unequal numbers in different layers: a configuration has one number for all"
            )
    if kept.mamba_heads:
        _check_indices("mamba_channels", kept.mamba_channels, parent.mamba_head_dim)


def _check_indices(name: str, indices: Sequence[int], size: int) -> None:
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise InputError(f"kept.{name} must be ascending numbers from 0 to {size - 1}, at least one")
