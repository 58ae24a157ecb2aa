"""Which form of an op runs: the fast torch form, or the one that NANOHYBRID_KERNELS=reference|torch forces for all of them."""

import os
from collections.abc import Callable
from typing import Any

FORMS = ("reference", "torch")


def choose(**forms: Callable[..., Any]) -> Callable[..., Any]:
    """The form to run among `forms` (`reference`, `torch`).

    Raises ValueError where the environment names a form that does not exist.
    """
    forced = os.environ.get("NANOHYBRID_KERNELS", "")
    if not forced:
        return forms["torch"]
    if forced not in FORMS:
        raise ValueError(f"NANOHYBRID_KERNELS is {forced!r}: known are {', '.join(FORMS)}")
    return forms[forced]
