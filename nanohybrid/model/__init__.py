"""The model: one ragged forward, layers that declare themselves, pools of state, bytes."""

from nanohybrid.model.cache import HybridCache
from nanohybrid.model.lm import HybridLM
from nanohybrid.ops.layout import Layout

__all__ = ["HybridCache", "HybridLM", "Layout"]
