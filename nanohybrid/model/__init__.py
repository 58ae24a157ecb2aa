"""The model: one ragged forward, layers that declare themselves, pools of state, bytes."""

from nanohybrid.model.footprint import Footprint
from nanohybrid.model.lm import HybridLM
from nanohybrid.model.state import State
from nanohybrid.ops.layout import Layout

__all__ = ["Footprint", "HybridLM", "Layout", "State"]
