"""Whole models from and to directories in the official Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nanohybrid.checkpoint.reader import CheckpointReader
from nanohybrid.checkpoint.writer import SHARD_BYTES, CheckpointWriter
from nanohybrid.errors import InputError
from nanohybrid.estimate.free_memory import check_room
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import (
    QuantizedLinear,
    check_format,
    quantized_linear,
    quantized_names,
    replace,
)


def load(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> HybridLM:
    """Load a checkpoint in `dtype` (None: as stored) onto `device`, tensor by tensor straight to where it belongs.

    On the host it needs the weights where they are to stay there, and 16 MiB. Quantized matrices stay as they are, `dtype` is of
    all the rest. quantize: int8, int4 or fp8 quantizes each matrix as it is read, some rows at a time; beside the result it then
    needs 20 MiB. Raises CheckpointError, ConfigError or InputError, the last also where the weights exceed what memory is free.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"a model cannot be loaded as {dtype}: weights are floating-point")
    with CheckpointReader(directory) as reader:
        chosen = _to_quantize(reader, quantize)
        check_room(reader.config, reader.held_bytes(dtype, quantize), device)
        reader.check_tied_head()
        with torch.device("meta"):
            model = HybridLM(reader.config)
        for name in reader.names():
            owner, _, leaf = name.rpartition(".")
            if name in reader.formats:
                replace(model, owner, QuantizedLinear(*reader.codes(name, device)))
            elif name in chosen and quantize is not None:
                replace(model, owner, quantized_linear(name, reader.rows(name, device), quantize))
            else:
                setattr(model.get_submodule(owner), leaf, nn.Parameter(reader.tensor(name, dtype, device)))
    return model


def _to_quantize(reader: CheckpointReader, format: str | None) -> set[str]:
    """The matrices to quantize on the way. A checkpoint that is in this format already is taken as it is."""
    if format is None:
        return set()
    check_format(format)
    stored = set(reader.formats.values())
    if stored - {format}:
        raise InputError(
            f"{reader.directory}: is quantized already ({', '.join(sorted(stored))}), and cannot be made {format}"
        )
    return set() if stored else set(quantized_names(reader.config, format))


def save(
    model: HybridLM,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    assets: str | Path | None = None,
) -> None:
    """Save a model, each parameter in its own type; above `max_shard_bytes` in several files with an index.

    The directory appears whole; in one that exists only the checkpoint's own files are replaced, the others stay.
    assets: a directory (a checkpoint's) whose tokenizer and chat template are copied.
    """
    parameters = dict(model.named_parameters())
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    dtypes, formats = (
        {name: p.dtype for name, p in parameters.items()},
        {name: linear.format for name, linear in linears.items()},
    )
    with CheckpointWriter(directory, model.config, dtypes, max_shard_bytes, assets, formats) as writer:
        for name, parameter in parameters.items():
            writer.write(name, parameter)
        for name, linear in linears.items():
            writer.write_codes(name, linear.codes, linear.scales)
