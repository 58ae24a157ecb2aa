"""Encoding of tensors as GGUF types.

The quantizers of the gguf library make several fp32 copies of their input, so they get at most 16 MiB of rows
at a time.

N rows · K columns.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanohybrid.errors import CheckpointError
from nanohybrid.extras import require

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

CHUNK = 4 * 2**20  # weights that are quantized at once
CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def byte_count(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor of this shape as `kind`."""
    block, size = require("gguf", "gguf").GGML_QUANT_SIZES[kind]
    return prod(shape) // block * size


def fits(shape: tuple[int, ...], kind: GGMLQuantizationType) -> bool:
    """Whether the rows of this shape consist of whole blocks of `kind`."""
    block: int = require("gguf", "gguf").GGML_QUANT_SIZES[kind][0]
    return shape[-1] % block == 0


def encode(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    """The bytes of `tensor` as `kind`, a uint8 array.

    Raises CheckpointError, naming the tensor, for an overflow in fp16.
    """
    if kind.name in CASTS:
        cast = tensor.to(CASTS[kind.name])
        if kind.name == "F16" and bool(cast.isinf().any()):
            raise CheckpointError(f"{name}: has values beyond 65,504, the range of f16; export as bf16")
        return cast.contiguous().view(-1).view(torch.uint8).numpy()
    quantize = require("gguf.quants", "gguf").quantize
    rows_NK = tensor.reshape(-1, tensor.shape[-1])
    chunks = rows_NK.split(max(1, CHUNK // rows_NK.shape[1]))
    return np.concatenate([quantize(chunk_NK.float().numpy(), kind).reshape(-1) for chunk_NK in chunks])
