"""Tensors as the bytes of a GGUF type.

The library's quantizers make several fp32 copies of what they are given, so they are given rows worth 16 MiB at a time.

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

PIECE = 4 * 2**20  # weights that are quantized at once
CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def byte_count(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """The bytes that a tensor of this shape takes as `kind`."""
    block, size = require("gguf", "gguf").GGML_QUANT_SIZES[kind]
    return prod(shape) // block * size


def fits(shape: tuple[int, ...], kind: GGMLQuantizationType) -> bool:
    """Whether rows of this shape are whole blocks of `kind`."""
    block: int = require("gguf", "gguf").GGML_QUANT_SIZES[kind][0]
    return shape[-1] % block == 0


def encode(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    """The bytes of `tensor` as `kind`, one uint8 array. Raises CheckpointError, naming the tensor, where fp16 cannot hold it."""
    if kind.name in CASTS:
        cast = tensor.to(CASTS[kind.name])
        if kind.name == "F16" and bool(cast.isinf().any()):
            raise CheckpointError(f"{name}: holds values beyond 65,504, which f16 cannot; export as bf16")
        return cast.contiguous().view(-1).view(torch.uint8).numpy()
    quantize = require("gguf.quants", "gguf").quantize
    rows_NK = tensor.reshape(-1, tensor.shape[-1])
    pieces = rows_NK.split(max(1, PIECE // rows_NK.shape[1]))
    return np.concatenate([quantize(piece_NK.float().numpy(), kind).reshape(-1) for piece_NK in pieces])
