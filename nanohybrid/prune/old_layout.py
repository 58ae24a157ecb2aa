"""Files of the release before this one: `kept.json`, and importance scores by kind of layer. They go with the
next release.

`kept.json` is still written beside `pruning_mask.json` for programs that read it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FILE = "kept.json"
AXES = {
    "hidden": "hidden_size", "ffn": "intermediate_size", "mamba_heads": "mamba_num_heads",
    "mamba_channels": "mamba_head_dim", "attention_heads": "num_attention_heads",
}  # fmt: skip
"""Old name -> axis, in the order of `kept.json`."""
SHARED = ("hidden", "mamba_channels")
SCORES = {
    "ffn": ("intermediate_size",),
    "mamba": ("mamba_num_heads", "mamba_head_dim"),
    "attention": ("num_attention_heads",),
}
"""Prefix of an old tensor of scores -> the axes of its dimensions."""
FACTS = {"outgoing": "scale_by_outgoing_norm", "layers_by": "depth_importance"}
"""Old name of a fact in a file of scores -> its name now."""
TARGET_KEYS = {
    "hidden_size": "sizes.hidden_size", "intermediate_size": "sizes.intermediate_size",
    "mamba_heads": "sizes.mamba_num_heads", "mamba_head_dim": "sizes.mamba_head_dim",
    "attention_heads": "sizes.num_attention_heads",
}  # fmt: skip
"""Old key of a target in a stored recipe -> where it stands now."""


def warn(file: Path, name: str) -> None:
    """One line on stderr for a file in the old layout."""
    print(
        f"nanohybrid: warning: {file} has the layout of the last release; it is now {name}, and the "
        "old one is read until the next",
        file=sys.stderr,
    )


def selection_row(
    layers: tuple[int, ...], axes: Mapping[str, Mapping[int | None, tuple[int, ...]]]
) -> dict[str, Any] | None:
    """A selection as `kept.json` had it; None where it has axes that `kept.json` had no name for."""
    if set(axes) - set(AXES.values()):
        return None
    row: dict[str, Any] = {"layers": list(layers)}
    for old, axis in AXES.items():
        found = axes.get(axis, {})
        if old in SHARED:
            row[old] = list(found.get(None, ()))
        else:
            row[old] = {str(layer): list(indices) for layer, indices in found.items()}
    return row


def selection_from(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a `kept.json` in the layout of `pruning_mask.json`. Raises KeyError where a name is
    missing."""
    return {"layers": row["layers"], "axes": {axis: row[old] for old, axis in AXES.items() if row[old]}}


def scores_from(tensors: Mapping[str, Tensor]) -> tuple[dict[int, Tensor], dict[int, tuple[str, ...]]]:
    """The scores of each layer, and the axes of their dimensions, of a file with a tensor `ffn.3` for each
    layer of a kind."""
    scores, axes = {}, {}
    for name, tensor in tensors.items():
        prefix, _, layer = name.partition(".")
        if prefix in SCORES and layer:
            scores[int(layer)], axes[int(layer)] = tensor, SCORES[prefix]
    return scores, axes
