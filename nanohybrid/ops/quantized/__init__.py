"""Weights in 8 or 4 bits: one rule for all formats, w = value(code) scale of its group. The rule is in formats.py."""

from nanohybrid.ops.quantized.formats import (
    CODES,
    FORMATS,
    SCALES,
    format_of,
    group_of,
    holds,
    shapes,
    spread,
    stored_bytes,
)
from nanohybrid.ops.quantized.torch import Rows, dequantize, linear, quantize

__all__ = [
    "CODES", "FORMATS", "SCALES", "Rows", "dequantize", "format_of", "group_of", "holds", "linear", "quantize", "shapes", "spread",
    "stored_bytes",
]  # fmt: skip
