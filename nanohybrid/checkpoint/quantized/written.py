"""Quantized matrices as they are written: the layouts of compressed-tensors that vLLM and transformers load.

    X = the name of a linear in the file                                     `format` in config.json
    int8    X.weight_packed int32 [N, ceil(K / 4)], X.weight_scale [N, G], X.weight_shape   pack-quantized
    int4    X.weight_packed int32 [N, K / 8], X.weight_scale [N, G], X.weight_shape         pack-quantized
    fp8     X.weight e4m3 [N, K], X.weight_scale [N, G]                                     float-quantized

A word holds four 8-bit or eight 4-bit numbers, the lowest bits first, each the code plus 128 or 8. So on a
little-endian machine the words of int4 are the bytes of its codes, and those of int8 are its codes with the
sign bit inverted. `naive-quantized`, which stores int8 codes as they are, is read and no longer written: vLLM
accepts it only with quantized activations.

N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops import quantized

PLAIN, PACKED, SCALE, SHAPE = "weight", "weight_packed", "weight_scale", "weight_shape"
LAYOUTS = {"int8": "pack-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}
SIGN_BIT = 0x80  # of an int8 code; inverted, it is the code plus 128


def written_parts(
    format: str, outputs: int, inputs: int, groups: int | None = None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of the tensors of a matrix, by the last part of their names.

    groups: of a row; None for the format's own.
    """
    scales = (outputs, groups or quantized.shapes(format, outputs, inputs)[1][1])
    codes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        PLAIN: (quantized.CODES[format], (outputs, inputs))
    }
    if format in ("int8", "int4"):
        words = -(-inputs // (4 if format == "int8" else 8))
        codes = {PACKED: (torch.int32, (outputs, words)), SHAPE: (torch.int64, (2,))}
    return codes | {SCALE: (quantized.SCALES[format], scales)}


def written_tensors(codes: Tensor, scales_NG: Tensor) -> dict[str, Tensor]:
    """Codes and scales (ops/quantized/formats.py) as the tensors of `written_parts`."""
    format = quantized.format_of(codes)
    if format == "fp8":
        return {PLAIN: codes, SCALE: scales_NG}
    outputs, width = codes.shape
    inputs = 2 * width if format == "int4" else width
    bytes_NB = codes if format == "int4" else codes.view(torch.uint8) ^ SIGN_BIT
    words = F.pad(bytes_NB, (0, -width % 4)).contiguous().view(torch.int32)
    return {PACKED: words, SHAPE: torch.tensor([outputs, inputs]), SCALE: scales_NG}
