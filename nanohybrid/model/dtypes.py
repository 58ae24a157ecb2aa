"""Names of dtypes, as users write them."""

import torch

from nanohybrid.errors import InputError

NAMES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a value or a name ("bf16", "bfloat16") says; None and "auto" give None.

    Raises InputError for an unknown name and for a dtype that is not floating-point.
    """
    if isinstance(dtype, str):
        if dtype != "auto" and dtype not in NAMES:
            raise InputError(f"dtype is {dtype!r}: known are auto, {', '.join(NAMES)}")
        return NAMES.get(dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"a model cannot be loaded as {dtype}: weights must be floating-point")
    return dtype
