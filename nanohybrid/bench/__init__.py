"""The headline: tokens that a hybrid and a Transformer of its size make in the same memory, planned and measured."""

from nanohybrid.bench.comparison import Contender, Mix, contenders, mixes
from nanohybrid.bench.roofline import Planned, plan

__all__ = ["Contender", "Mix", "Planned", "contenders", "mixes", "plan"]
