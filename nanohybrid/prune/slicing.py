"""Pruning as surgery between two configurations, from the axes that the layers declare and from nothing else.

What is exact. Let the full model be masked: weights that write or read a removed entry are zero. The sliced model then computes
the same, but for the norms over a pruned width: with n of N channels kept, the masked norm divides by the mean over N, of which
N - n are zeros, and the sliced one by the mean over n. So
    sliced(x; weight, eps) = masked(x; weight sqrt(n / N), eps n / N)
holds exactly, for RMSNorm (embedding channels) and for Mamba's gated norm within each group (heads and head channels). FFN
neurons, attention heads and layers pass no norm and are equal as they stand. The slices are plain: no weight is rescaled here;
the channels that go carry little of the mean, and distillation finds the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.model.mixers.axes import axis_sizes, selected_index
from nanohybrid.model.spec import param_specs
from nanohybrid.prune.selection import Kept

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16


@dataclass(frozen=True)
class Slice:
    """How a tensor is cut from its parent's: the parent's name, and for each dimension the indices that remain (None: all)."""

    source: str
    indices: tuple[Tensor | None, ...]

    def cut(self, tensor: Tensor) -> Tensor:
        """The part that remains, as a tensor of its own."""
        for dimension, index in enumerate(self.indices):
            if index is not None:
                tensor = take(tensor, dimension, index)
        return tensor.contiguous()


def take(tensor: Tensor, dimension: int, index: Tensor) -> Tensor:
    """index_select; on a CPU by numpy, which along rows is four times as fast (docs/log.md)."""
    if tensor.device.type != "cpu":
        return tensor.index_select(dimension, index.to(tensor.device))
    bits = tensor.detach().view(BITS[tensor.element_size()]).numpy()
    return torch.from_numpy(np.take(bits, index.numpy(), axis=dimension)).view(tensor.dtype)


def prune_state(config: HybridConfig, kept: Kept) -> tuple[HybridConfig, dict[str, Slice]]:
    """The configuration of what remains, and how each of its tensors, by name, is cut from the parent's."""
    sizes = axis_sizes(config)
    place = {old: new for new, old in enumerate(kept.layers)}
    slices = {}
    for name, declared in param_specs(config).items():
        if declared.layer is not None and declared.layer not in place:
            continue
        remaining = kept.axes(declared.layer)
        indices = tuple(selected_index(axis, sizes, remaining) for axis in declared.axes)
        whole = [len(index) == size for index, size in zip(indices, declared.shape, strict=True)]
        new = name if declared.layer is None else rename(name, declared.layer, place[declared.layer])
        slices[new] = Slice(
            name, tuple(None if all_of else index for index, all_of in zip(indices, whole, strict=True))
        )
    return kept.config(config), slices


def rename(name: str, old: int, new: int) -> str:
    """The name of a parameter when its layer moves from place `old` to `new`."""
    return name.replace(f".layers.{old}.", f".layers.{new}.", 1)


@torch.no_grad()
def prune_model(model: HybridLM, kept: Kept) -> HybridLM:
    """A model of its own with what remains of `model`."""
    config, slices = prune_state(model.config, kept)
    source = model.state_dict()
    with torch.device("meta"):
        pruned = HybridLM(config)
    pruned.load_state_dict(
        {name: piece.cut(source[piece.source]).clone() for name, piece in slices.items()}, assign=True
    )
    return pruned.eval()


def prune_checkpoint(
    source: Path, kept: Kept, directory: Path, advance: Callable[[int], object] | None = None
) -> HybridConfig:
    """Prune from disk to disk: memory for one tensor and its part. Writes the checkpoint and `kept.json` into `directory`."""
    with CheckpointReader(source) as reader:
        config, slices = prune_state(reader.config, kept)
        wanted = {piece.source: name for name, piece in slices.items()}
        types = {name: reader.dtype(piece.source) for name, piece in slices.items()}
        with CheckpointWriter(directory, config, types, assets=source) as writer:
            for old in reader.names():
                if old in wanted:
                    new = wanted[old]
                    writer.write(new, slices[new].cut(reader.tensor(old)))
                if advance is not None:
                    advance(1)
    kept.write(directory)
    return config
