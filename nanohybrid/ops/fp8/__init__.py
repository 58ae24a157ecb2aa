"""FP8 training numerics: E4M3 operands with a scale for each 1 x 128 tile or 128 x 128 block. The recipe is reference.py."""

from nanohybrid.ops.fp8.emulated import dequantize, linear, quantize, rounded
from nanohybrid.ops.fp8.reference import E4M3, GROUP, LARGEST

__all__ = ["E4M3", "GROUP", "LARGEST", "dequantize", "linear", "quantize", "rounded"]
