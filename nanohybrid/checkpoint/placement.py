"""The layout of a checkpoint's files: names, types and shapes of the tensors, and the file of each."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from nanohybrid.checkpoint.config_fields import NEMOTRON
from nanohybrid.checkpoint.dialects import model_type
from nanohybrid.checkpoint.header import FLOATS
from nanohybrid.checkpoint.match import SINGLE
from nanohybrid.checkpoint.names import EMBEDDINGS, HEAD, disk_names
from nanohybrid.checkpoint.quantized.written import PLAIN, written_parts
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.model.spec import param_specs

SHARD_BYTES = 5 * 10**9


class TensorPlacement(NamedTuple):
    """One tensor of a file: the model's name for it, its name in the file, type and shape."""

    name: str
    disk: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def place_tensors(
    config: HybridConfig,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    formats: Mapping[str, str],
    groups: Mapping[str, int],
) -> list[TensorPlacement]:
    """The tensors to write, in the order of the forward pass.

    A tied head is written too under `nemotron_h`, which other programs read without the tie. Raises
    InputError for a type that cannot be stored.
    """
    declared, disk = param_specs(config), disk_names(config)
    result: list[TensorPlacement] = []
    for name in declared:
        if name in formats:
            shape = (declared[name].shape[0], declared[name].shape[1])
            scales = shape[1] // groups[name] if name in groups else None
            result += _parts(name, disk[name], written_parts(formats[name], *shape, scales))
            continue
        kind = dtype if isinstance(dtype, torch.dtype) else dtype[name]
        if kind not in FLOATS.values():
            raise InputError(
                f"{name} cannot be saved as {kind}: known are {', '.join(map(str, FLOATS.values()))}"
            )
        result.append(TensorPlacement(name, disk[name], kind, declared[name].shape))
    if config.tie_word_embeddings and model_type(config) == NEMOTRON:
        embeddings = next(placement for placement in result if placement.name == EMBEDDINGS)
        result.append(TensorPlacement(HEAD, HEAD, embeddings.dtype, embeddings.shape))
    return result


def _parts(
    name: str, disk: str, parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> list[TensorPlacement]:
    """The tensors of one quantized matrix."""
    ours, theirs = name.removesuffix(PLAIN), disk.removesuffix(PLAIN)
    return [TensorPlacement(ours + part, theirs + part, *what) for part, what in parts.items()]


def shards(tensors: list[TensorPlacement], most: int) -> dict[str, list[TensorPlacement]]:
    """Files and their tensors: in order, as many as fit in `most` bytes, at least one."""
    files: list[list[TensorPlacement]] = [[]]
    for placement in tensors:
        if files[-1] and sum(other.bytes for other in files[-1]) + placement.bytes > most:
            files.append([])
        files[-1].append(placement)
    for shard in files:
        shard.sort(
            key=lambda placement: -placement.dtype.itemsize
        )  # so each tensor is aligned to the size of its type
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {
        f"model-{index:05d}-of-{len(files):05d}.safetensors": shard for index, shard in enumerate(files, 1)
    }
