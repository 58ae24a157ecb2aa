"""Interpolation of two checkpoints: (1 - weight) first + weight second, tensor by tensor.

Two models aligned from the same parent for different aims often lie in one basin, and a point between them has most of both. The
paper tries weights 0.1 to 0.9 and takes about 0.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load, refuse_quantized, save
from nanohybrid.errors import CheckpointError, ConfigError
from nanohybrid.stages import open_stage


@dataclass(frozen=True)
class MergeRecipe:
    """How to merge two checkpoints."""

    weight: float = 0.5
    """Share of the second checkpoint; 0 is the first, 1 the second."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight is {self.weight}, it must be from 0 to 1")


def merge(recipe: MergeRecipe, first: Path, second: Path, out: Path) -> Path:
    """Write the checkpoint between `first` and `second`; tokenizer and template come from the first."""
    for path in (first, second):
        refuse_quantized(path)
    with open_stage(out, "merge", recipe, {"first": first, "second": second}) as stage:
        if stage.complete:
            return out
        model = load(first)
        other = load(second).state_dict()
        model.load_state_dict(interpolate(model.state_dict(), other, recipe.weight))
        save(model, stage.directory, assets=first)
    return out


def interpolate(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """(1 - weight) first + weight second, computed in fp32 and returned in the dtypes of the first."""
    for name in sorted(first.keys() | second.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (first, second)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{name} is {shapes[0]} in the first checkpoint and {shapes[1]} in the second: only twins can be merged"
            )
    return {
        name: torch.lerp(tensor.float(), second[name].float(), weight).to(tensor.dtype)
        for name, tensor in first.items()
    }
