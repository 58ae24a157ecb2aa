"""Loading and saving of whole models in the Hugging Face layout."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from nanohybrid.checkpoint.reader import CheckpointReader
from nanohybrid.checkpoint.writer import SHARD_BYTES, CheckpointWriter
from nanohybrid.estimate.free_memory import check_memory
from nanohybrid.model import HybridLM
from nanohybrid.model.dtypes import as_dtype
from nanohybrid.model.quantized import Difference, QuantizedLinear, quantized_linear, replace


def load(
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    packed_blocks: bool = True,
) -> HybridLM:
    """Load a checkpoint (a directory, a GGUF file or an id of the Hub) onto `device`, tensor by tensor.

    Beside the weights it needs 16 MiB of host memory, and for GPTQ and AWQ one matrix as it is stored. What
    becomes of the blocks of a GGUF file and of the quantized matrices of other programs is printed in one
    line on standard error.

    dtype     of the parameters, also by name ("bf16"); None keeps the stored types. Quantized matrices
              keep their format.
    quantize  int8, int4 or fp8: quantize each matrix while it is read, some rows at a time, with 20 MiB
              beside the result. Matrices of other formats of 8 bits are quantized again; the difference is
              printed
    packed_blocks  whether matrices of a GGUF file whose codes are in a format of ours stay quantized, where
              no dtype and no other format is asked for; else they become numbers

    Raises CheckpointError or ConfigError for a damaged or unknown checkpoint, and InputError for a bad dtype
    or format, or where the weights exceed the free memory.
    """
    dtype = as_dtype(dtype)
    with CheckpointReader(directory) as reader:
        chosen, unchanged = reader.to_quantize(quantize), dict[str, str]()
        if packed_blocks:
            unchanged = reader.unchanged(dtype, quantize)
        if (line := reader.told(unchanged, dtype, quantize)) is not None:
            print(f"nanohybrid: {line}", file=sys.stderr)
        check_memory(reader.config, reader.weight_bytes(dtype, quantize), device)
        reader.check_tied_head()
        with torch.device("meta"):
            model = HybridLM(reader.config)
        formats, again = reader.formats, Difference()
        for name in reader.names():
            owner, _, leaf = name.rpartition(".")
            if name in unchanged:
                replace(model, owner, QuantizedLinear(*reader.packed(name, device)))
            elif name in chosen and quantize is not None:
                linear = quantized_linear(name, reader.rows(name, device), quantize)
                replace(model, owner, linear)
                if name in reader.layouts:
                    again.add(linear, reader.rows(name, device))
            elif name in formats:
                replace(model, owner, QuantizedLinear(*reader.codes(name, device)))
            else:
                setattr(model.get_submodule(owner), leaf, nn.Parameter(reader.tensor(name, dtype, device)))
    if again.matrices and model.device.type != "meta":
        line = f"the matrices that were quantized again differ by {again.share:.2%} from the files (norm)"
        print(f"nanohybrid: {line}", file=sys.stderr)
    return model


def cast_as_stored(model: HybridLM, directory: str | Path) -> None:
    """Give each parameter the dtype that it has in a checkpoint. A model that was trained in fp32 is then no
    larger than the one that it came from. Parameters that are quantized or missing there stay as they are.
    """
    with CheckpointReader(directory) as reader:
        stored = {name: reader.dtype(name) for name in reader.names() if name not in reader.formats}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored.get(name, parameter.dtype))


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
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    formats = {name: linear.format for name, linear in linears.items()}
    groups = {name: linear.in_features // linear.scales.shape[1] for name, linear in linears.items()}
    with CheckpointWriter(
        directory, model.config, dtypes, max_shard_bytes, assets, formats, groups
    ) as writer:
        for name, parameter in parameters.items():
            writer.write(name, parameter)
        for name, linear in linears.items():
            writer.write_codes(name, linear.codes, linear.scales)
