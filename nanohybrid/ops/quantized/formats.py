"""The formats: a weight [N, K] as codes and scales, where groups of neighbors in a row share a scale.

    w[n, k] = value(codes[n, k]) scales[n, k // group]

| format | codes                                         | value | group along K             | scales |
|--------|-----------------------------------------------|-------|---------------------------|--------|
| int8   | int8 [N, K], from -127                        | code  | 128, or less (`group_of`) | bf16   |
| int4   | uint8 [N, K / 2], even k in the low four bits | c - 8 | 32; K a multiple of it    | bf16   |
| fp8    | float8_e4m3fn [N, K]                          | code  | the whole row             | fp32   |

The dtype of the codes determines the format, and the shapes determine the group, so the two tensors describe
the weight completely. A scale may be negative: int4 ranges from -8 to 7, and the sign selects the side that
needs the 8.

N outputs, K inputs.
"""

import torch
from torch import Tensor

CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
SCALES = {"int8": torch.bfloat16, "int4": torch.bfloat16, "fp8": torch.float32}
FORMATS = tuple(CODES)
INT8_GROUP, INT4_GROUP = 128, 32
MIN_GROUP = 32  # below it the scales of int8 would take more than a sixteenth of the codes' bytes
ZERO = 8  # the int4 code of zero


def group_of(format: str, inputs: int) -> int:
    """How many weights of a row of `inputs` share a scale.

    For int8: 128, else the largest power of two of at least 32 that divides the row, else the whole row.
    """
    if format == "int4":
        return INT4_GROUP
    if format == "fp8":
        return inputs
    group = INT8_GROUP
    while inputs % group:
        group //= 2
    return group if group >= MIN_GROUP else inputs


def holds(format: str, inputs: int) -> bool:
    """Whether rows of `inputs` can be stored in the format; int4 needs a multiple of 32."""
    return inputs % group_of(format, inputs) == 0


def format_of(codes: Tensor) -> str:
    """The format of codes, by their dtype. Raises ValueError for other dtypes."""
    for name, dtype in CODES.items():
        if codes.dtype == dtype:
            return name
    known = ", ".join(f"{dtype} ({name})" for name, dtype in CODES.items())
    raise ValueError(f"codes are {codes.dtype}: known are {known}")


def shapes(format: str, outputs: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of codes and scales."""
    return (outputs, inputs // 2 if format == "int4" else inputs), (
        outputs,
        inputs // group_of(format, inputs),
    )


def stored_bytes(format: str, outputs: int, inputs: int, groups: int | None = None) -> int:
    """Bytes of codes and scales together. groups: of a row; None for the format's own."""
    codes, scales = shapes(format, outputs, inputs)
    return codes[0] * codes[1] + scales[0] * (groups or scales[1]) * SCALES[format].itemsize
