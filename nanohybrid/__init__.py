"""nanohybrid: a hybrid Mamba-2 / attention language model, from raw text to a compressed, thinking model.

The public face; each name is imported when it is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanohybrid.version import VERSION

if TYPE_CHECKING:
    from nanohybrid.checkpoint import load as load
    from nanohybrid.checkpoint import load_config as load_config
    from nanohybrid.checkpoint import save as save
    from nanohybrid.config import HybridConfig as HybridConfig
    from nanohybrid.engine import LLM as LLM
    from nanohybrid.engine import SamplingParams as SamplingParams
    from nanohybrid.engine import StructuredOutputs as StructuredOutputs
    from nanohybrid.model.cache import HybridCache as HybridCache
    from nanohybrid.model.lm import HybridLM as HybridLM
    from nanohybrid.ops.layout import Layout as Layout
    from nanohybrid.presets import preset as preset

__version__ = VERSION

# Rounds that a waiting thread of torch's spins before it sleeps; read when torch loads. By default it spins
# on for milliseconds and takes the processor from the threads that run our kernels: a decode step then takes
# twice as long (docs/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "HybridConfig": "nanohybrid.config",
    "HybridLM": "nanohybrid.model.lm",
    "LLM": "nanohybrid.engine",
    "Layout": "nanohybrid.ops.layout",
    "SamplingParams": "nanohybrid.engine",
    "StructuredOutputs": "nanohybrid.engine",
    "HybridCache": "nanohybrid.model.cache",
    "load": "nanohybrid.checkpoint",
    "load_config": "nanohybrid.checkpoint",
    "preset": "nanohybrid.presets",
    "save": "nanohybrid.checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanohybrid' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
