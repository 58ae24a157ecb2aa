"""Which form of an op runs: by device, or forced for all of them by NANOHYBRID_KERNELS=reference|torch."""

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

FORMS = ("reference", "torch")


def choose(x: Tensor, **forms: Callable[..., Any]) -> Callable[..., Any]:
    """The form to run on `x`'s device among `forms` (`reference`, `torch`, ...).

    Raises ValueError where the environment names a form that does not exist.
    """
    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    if not forced:
        return forms["torch"]
    if forced not in FORMS:
        raise ValueError(f"NANOHYBRID_KERNELS is {forced!r}: known are {', '.join(FORMS)}")
    return forms[forced]
