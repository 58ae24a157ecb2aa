"""The model: one ragged forward, mixers that declare themselves, and the cache.

Names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanohybrid.model.cache import HybridCache
    from nanohybrid.model.lm import HybridLM
    from nanohybrid.ops.layout import Layout

_MODULES = {
    "HybridCache": "nanohybrid.model.cache",
    "HybridLM": "nanohybrid.model.lm",
    "Layout": "nanohybrid.ops.layout",
}
__all__ = ["HybridCache", "HybridLM", "Layout"]


def __getattr__(
    name: str,
) -> Any:  # lazily: nanohybrid.config imports model.mixers, and model.lm the configuration
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
