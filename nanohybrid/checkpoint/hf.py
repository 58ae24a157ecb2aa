"""Whole models from and to directories in the official Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nanohybrid.checkpoint.reader import CheckpointReader
from nanohybrid.checkpoint.writer import SHARD_BYTES, CheckpointWriter
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM


def load(directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> HybridLM:
    """Load a checkpoint in `dtype` (None: as stored) onto `device`, tensor by tensor straight to where it belongs.

    On the host it needs the weights where they are to stay there, and 16 MiB. Raises CheckpointError or ConfigError.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"a model cannot be loaded as {dtype}: weights are floating-point")
    with CheckpointReader(directory) as reader:
        reader.check_tied_head()
        with torch.device("meta"):
            model = HybridLM(reader.config)
        for name in reader.names():
            owner, _, leaf = name.rpartition(".")
            tensor = reader.tensor(name, dtype, device)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model


def save(model: HybridLM, directory: str | Path, max_shard_bytes: int = SHARD_BYTES, assets: str | Path | None = None) -> None:
    """Save a model, each parameter in its own type; above `max_shard_bytes` in several files with an index.

    The directory appears whole; in one that exists only the checkpoint's own files are replaced, the others stay.
    assets: a directory (a checkpoint's) whose tokenizer and chat template are copied.
    """
    parameters = dict(model.named_parameters())
    with CheckpointWriter(directory, model.config, {name: p.dtype for name, p in parameters.items()}, max_shard_bytes, assets) as writer:
        for name, parameter in parameters.items():
            writer.write(name, parameter)
