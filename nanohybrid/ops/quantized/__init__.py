"""Weights in 8 or 4 bits: one rule for all formats, w = value(code) scale of its group. The rule is in formats.py."""

from nanohybrid.ops.quantized.blocks import dequantize, linear, quantize
from nanohybrid.ops.quantized.formats import FORMATS, INT4_GROUP, format_of, group_of, holds, stored_bytes

__all__ = ["FORMATS", "INT4_GROUP", "dequantize", "format_of", "group_of", "holds", "linear", "quantize", "stored_bytes"]
