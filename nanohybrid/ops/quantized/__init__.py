"""Weights in 8 or 4 bits.

All formats follow one rule, w = value(code) * scale of its group; formats.py defines it.
"""

from nanohybrid.ops.quantized.formats import (
    CODES,
    FORMATS,
    SCALES,
    format_of,
    group_of,
    holds,
    shapes,
    stored_bytes,
)
from nanohybrid.ops.quantized.torch import WeightRows, dequantize, linear, quantize

__all__ = [
    "CODES",
    "FORMATS",
    "SCALES",
    "WeightRows",
    "dequantize",
    "format_of",
    "group_of",
    "holds",
    "linear",
    "quantize",
    "shapes",
    "stored_bytes",
]  # fmt: skip
