"""What the formats are: a weight [N, K] as codes and scales, groups of one row's neighbors sharing a scale.

    w[n, k] = value(codes[n, k]) scales[n, k // group]

| format | codes                                                                  | value  | group along K              | scales |
|--------|------------------------------------------------------------------------|--------|----------------------------|--------|
| int8   | int8 [N, K], from -127                                                 | code   | 128, or less (`group_of`)  | bf16   |
| int4   | uint8 [N, K / 2], two a byte: even k in the low four bits, odd k above | c - 8  | 32; K a multiple of it     | bf16   |
| fp8    | float8_e4m3fn [N, K]                                                   | code   | the whole row              | fp32   |

The type of the codes says the format, the shapes say the group, so the two tensors are all there is to keep. A scale may be
negative: int4 reaches to -8 on one side and to 7 on the other, and the sign says which side of a group needs the 8.

N outputs, K inputs.
"""

import torch
from torch import Tensor

CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
SCALES = {"int8": torch.bfloat16, "int4": torch.bfloat16, "fp8": torch.float32}
FORMATS = tuple(CODES)
INT8_GROUP, INT4_GROUP = 128, 32
LEAST_GROUP = 32  # below it the scales of int8 would weigh more than a sixteenth of the codes
ZERO = 8  # the int4 code of zero


def group_of(format: str, inputs: int) -> int:
    """How many weights of a row of `inputs` share a scale. For int8 128, else the largest power of two of 32 or more that
    divides the row, else all of it."""
    if format == "int4":
        return INT4_GROUP
    if format == "fp8":
        return inputs
    group = INT8_GROUP
    while inputs % group:
        group //= 2
    return group if group >= LEAST_GROUP else inputs


def holds(format: str, inputs: int) -> bool:
    """Whether the format has a form for rows of `inputs`: int4 for multiples of 32 only."""
    return inputs % group_of(format, inputs) == 0


def format_of(codes: Tensor) -> str:
    """The format that codes of this type are in. Raises ValueError."""
    for name, dtype in CODES.items():
        if codes.dtype == dtype:
            return name
    raise ValueError(
        f"codes are {codes.dtype}: known are {', '.join(f'{dtype} ({name})' for name, dtype in CODES.items())}"
    )


def shapes(format: str, outputs: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of codes and scales."""
    return (outputs, inputs // 2 if format == "int4" else inputs), (
        outputs,
        inputs // group_of(format, inputs),
    )


def stored_bytes(format: str, outputs: int, inputs: int) -> int:
    """Bytes of codes and scales together."""
    codes, scales = shapes(format, outputs, inputs)
    return codes[0] * codes[1] + scales[0] * scales[1] * SCALES[format].itemsize


def spread(scales: Tensor, format: str, outputs: int, inputs: int) -> Tensor:
    """Scales of a whole matrix, of rows, or of larger groups than the format's, as the format's own, [N, G]."""
    _, (_, groups) = shapes(format, outputs, inputs)
    scales_NG = (
        scales.to(SCALES[format]).reshape(-1, 1 if scales.ndim < 2 else scales.shape[1]).expand(outputs, -1)
    )
    return scales_NG.repeat_interleave(groups // scales_NG.shape[1], dim=1).contiguous()
