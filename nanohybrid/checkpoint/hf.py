"""Loading and saving of whole models in the Hugging Face layout."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from nanohybrid.checkpoint.reader import CheckpointReader
from nanohybrid.checkpoint.writer import SHARD_BYTES, CheckpointWriter
from nanohybrid.errors import InputError
from nanohybrid.estimate.free_memory import check_memory
from nanohybrid.model import HybridLM
from nanohybrid.model.dtypes import as_dtype
from nanohybrid.model.quantized import (
    QuantizedLinear,
    check_format,
    quantized_linear,
    quantized_names,
    replace,
)


def load(
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    packed_blocks: bool = True,
) -> HybridLM:
    """Load a checkpoint, a directory or an id of the Hub, onto `device`, tensor by tensor.

    Beside the weights it needs 16 MiB of host memory.

    directory: a checkpoint's, or a GGUF file. What becomes of a GGUF file's blocks is said in one line on
    standard error.

    dtype     of the parameters, also by name ("bf16"); None keeps the stored types. Quantized matrices
              keep their format.
    quantize  int8, int4 or fp8: quantize each matrix while it is read, some rows at a time, with 20 MiB
              beside the result
    packed_blocks  whether matrices of a GGUF file whose codes are in a format of ours become quantized
              matrices, where no dtype is given, and no other format; else they become numbers

    Raises CheckpointError or ConfigError for a damaged or unknown checkpoint, and InputError for a bad dtype
    or format, or where the weights exceed the free memory.
    """
    dtype = as_dtype(dtype)
    with CheckpointReader(directory) as reader:
        chosen = _to_quantize(reader, quantize)
        packed = _packed(reader, dtype, quantize) if packed_blocks else {}
        if (line := reader.told(packed, dtype, quantize)) is not None:
            print(f"nanohybrid: {line}", file=sys.stderr)
        check_memory(reader.config, reader.weight_bytes(dtype, quantize), device)
        reader.check_tied_head()
        with torch.device("meta"):
            model = HybridLM(reader.config)
        for name in reader.names():
            owner, _, leaf = name.rpartition(".")
            if name in reader.formats:
                replace(model, owner, QuantizedLinear(*reader.codes(name, device)))
            elif name in packed:
                replace(model, owner, QuantizedLinear(*reader.packed(name, device)))
            elif name in chosen and quantize is not None:
                replace(model, owner, quantized_linear(name, reader.rows(name, device), quantize))
            else:
                setattr(model.get_submodule(owner), leaf, nn.Parameter(reader.tensor(name, dtype, device)))
    return model


def _packed(reader: CheckpointReader, dtype: torch.dtype | None, format: str | None) -> dict[str, str]:
    """The matrices of a GGUF file that keep their codes, and the format of each."""
    if dtype is not None and format is None:
        return {}
    return {name: own for name, own in reader.packable.items() if format in (None, own)}


def _to_quantize(reader: CheckpointReader, format: str | None) -> set[str]:
    """The matrices to quantize; none if the checkpoint has this format already.

    Raises InputError if it has another one.
    """
    if format is None:
        return set()
    check_format(format)
    stored = set(reader.formats.values())
    if stored - {format}:
        raise InputError(
            f"{reader.directory}: is quantized already ({', '.join(sorted(stored))}), so it cannot be "
            f"quantized to {format}"
        )
    return set() if stored else set(quantized_names(reader.config, format))


def save(
    model: HybridLM,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    assets: str | Path | None = None,
) -> None:
    """Save a model, each parameter in its dtype; in several files with an index above `max_shard_bytes`.

    A new directory appears when it is complete. In an existing one, only files of the checkpoint are
    replaced. assets: a checkpoint directory whose tokenizer and chat template are copied. Raises
    CheckpointError or InputError where the directory or a dtype cannot be written.
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
