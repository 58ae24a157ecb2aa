"""The types of tensors in GGUF files: those that are read, and the others, to refuse them by name."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A type that is read: its number in files, and the weights and bytes of a block."""

    number: int
    weights: int
    bytes: int


KINDS = {
    "F32": Kind(0, 1, 4), "F16": Kind(1, 1, 2), "BF16": Kind(30, 1, 2), "Q8_0": Kind(8, 32, 34),
    "Q4_0": Kind(2, 32, 18), "Q4_1": Kind(3, 32, 20), "Q5_0": Kind(6, 32, 22), "Q5_1": Kind(7, 32, 24),
    "Q4_K": Kind(12, 256, 144), "Q5_K": Kind(13, 256, 176), "Q6_K": Kind(14, 256, 210),
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
NUMBERS = {kind.number: name for name, kind in KINDS.items()}
OTHERS = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
