"""Quantization as a stage: int8, int4 or fp8 weights, layer by layer, with a report of what it costs."""
