"""Estimates: bytes and speed of a model when it serves, trains or is compressed, from what its mixers
declare.

Nothing is allocated, and no weights are needed. `nanohybrid plan` and `nanohybrid inspect` print these
estimates.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanohybrid.estimate.footprint import Footprint

__all__ = ["Footprint"]


def __getattr__(name: str) -> Any:  # lazily: `--help` reads units and defaults, and needs no torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("nanohybrid.estimate.footprint"), name)
