"""Linear interpolation of two checkpoints: (1 - weight) first + weight second, for each tensor.

Two models that were aligned from one base model for different goals often lie in one basin of the loss, and a
point between them keeps most of both abilities. The paper tries weights from 0.1 to 0.9 and uses about 0.5
(section 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanohybrid.checkpoint import load, refuse_quantized, resolve, save
from nanohybrid.errors import CheckpointError, ConfigError
from nanohybrid.stages import open_stage


@dataclass(frozen=True)
class MergeRecipe:
    """Merging of two checkpoints."""

    weight: float = 0.5
    """Weight of the second checkpoint: 0 gives the first, 1 the second."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight is {self.weight}, it must be from 0 to 1")


def merge(recipe: MergeRecipe, first: Path, second: Path, out: Path) -> Path:
    """Write the interpolation of `first` and `second` to `out`, which is returned; tokenizer and template are
    those of `first`.

    Raises InputError for a quantized checkpoint, and CheckpointError where the two have different tensors.
    """
    first, second = resolve(first), resolve(second)
    for path in (first, second):
        refuse_quantized(path)
    with open_stage(out, "merge", recipe, {"first": first, "second": second}) as stage:
        if stage.complete:
            return out
        model = load(first, packed_blocks=False)
        other = load(second, packed_blocks=False).state_dict()
        model.load_state_dict(interpolate(model.state_dict(), other, recipe.weight))
        save(model, stage.directory, assets=first)
    return out


def interpolate(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """(1 - weight) first + weight second, computed in fp32 and returned in the dtypes of `first`.

    Raises CheckpointError, naming the tensor, where names or shapes differ.
    """
    for name in sorted(first.keys() | second.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (first, second)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{name} is {shapes[0]} in the first checkpoint and {shapes[1]} in the second: "
                "only checkpoints of the same architecture can be merged"
            )
    return {
        name: torch.lerp(tensor.float(), second[name].float(), weight).to(tensor.dtype)
        for name, tensor in first.items()
    }
