"""What a budget leaves of a model, before a weight is read: every shape of a grid that fits, its bytes, its speed, its promise.

The promise is a prior where nothing was measured: the share of each axis that goes, weighted by what the paper's own tables say an
axis costs (WEIGHTS), added up. It orders shapes and predicts no accuracy. With a file of importance scores it is the share of the
model's measured importance that goes (promise.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanohybrid.compress.search import SHAPE, Grid, targets
from nanohybrid.config import HybridConfig
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import Budget, Memory, within
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.presets import PRESETS
from nanohybrid.prune.depth_rule import layers_to_drop
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import Promise
from nanohybrid.prune.target import Target, sizes_of

PAPER = Grid(
    drop_layers=(6, 8, 10),  # of 62: 56, 54, 52
    hidden=tuple(k / 32 for k in range(32, 27, -1)),  # 5120 down to 4480
    ffn=tuple(k / 64 for k in range(64, 41, -1)),  # 20480 down to 13440
    mamba_heads=(1.0, 0.9375, 0.875),  # 128, 120, 112
    mamba_channels=(1.0,),
)
# What losing all of an axis costs, beside embedding channels and FFN neurons. Depth: 56, 54 and 52 layers score 51.48, 47.35 and
# 44.92 in the paper. Mamba heads: with 112 of 128 a wider FFN scores 4 points less than 128 with a narrower one.
WEIGHTS = {
    "layers": 4.0,
    "hidden_size": 1.0,
    "intermediate_size": 1.0,
    "mamba_heads": 2.0,
    "mamba_head_dim": 2.0,
    "attention_heads": 1.0,
}
PRIOR = (
    "prior: 1 minus the weighted share of each axis that goes (layers 4, Mamba heads 2, embedding and FFN 1, after the paper's "
    "tables); an order of shapes, no prediction of accuracy, and nothing of these weights is known"
)
MEASURED = "importance: 1 minus the share of the measured importance that goes, added over the axes; nothing was retrained"
MEASURED_WIDTHS = (
    MEASURED
    + "; these scores rank no layers, so depth is the prior's (4 times the share of layers that goes)"
)


@dataclass(frozen=True)
class Shape:
    """A shape that fits, and how to prune to it: which layers go, by their number in the parent, and the sizes that change."""

    config: HybridConfig
    target: Target
    parameters: int
    memory: Memory
    tokens_per_second: float
    quality: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "config": {
                **{name: getattr(self.config, name) for name in SHAPE},
                "pattern": self.config.pattern,
            },
            "drop_layers": list(self.target.drop_layers),
            "parameters": self.parameters,
            "bytes": self.memory.as_dict(),
            "tokens_per_second_estimate": round(self.tokens_per_second, 2),
            "quality_estimate": round(self.quality, 6),
        }


@dataclass(frozen=True)
class Plan:
    """The shapes that fit, in order of the estimate of quality; how it was estimated; how many shapes were too large."""

    shapes: tuple[Shape, ...]
    rejected: int
    estimate: str


def grid_of(parent: HybridConfig, other: Grid | None = None) -> Grid:
    """The paper's grid for the paper's parent; for any other `other`, else a wide and coarse one."""
    if parent.pattern == PRESETS["nano-12b-v2"]["pattern"]:
        return PAPER
    layers = parent.num_hidden_layers
    return other or Grid(
        drop_layers=tuple(dict.fromkeys(2 * round(layers * share / 2) for share in (0, 0.1, 0.2))),
        hidden=tuple(k / 16 for k in range(16, 11, -1)),
        ffn=tuple(k / 16 for k in range(16, 7, -1)),
        mamba_heads=(1.0, 0.875, 0.75),
        mamba_channels=(1.0,),
    )


def plan(
    parent: HybridConfig,
    budget: Budget,
    device: Device,
    importance: Importance | None = None,
    grid: Grid | None = None,
) -> Plan:
    """Every shape of the grid, and the parent itself, that fits the budget. Raises InputError where none does."""
    judge = _Judge(parent, importance)
    named = ((target, judge.named(target)) for target in _targets(parent, grid or grid_of(parent)))
    found, rejected = within(
        budget, parent, (((target, name), name.config(parent, importance)) for target, name in named)
    )
    fitting = []
    for (target, name), config, memory in found:
        speed = decode_step(config, budget).tokens_per_second(device)
        count = Footprint.of(config).parameters
        fitting.append(Shape(config, _changes(name, parent), count, memory, speed, 1 - judge.lost(target)))
    fitting.sort(
        key=lambda shape: (
            -shape.quality,
            -shape.parameters,
            tuple(getattr(shape.config, name) for name in SHAPE),
        )
    )
    return Plan(tuple(fitting), rejected, judge.estimate)


def _targets(parent: HybridConfig, grid: Grid) -> Sequence[Target]:
    whole = Target(layers=parent.num_hidden_layers)
    return [whole, *(target for target in targets(parent, grid) if _changes(target, parent) != Target())]


def _changes(target: Target, parent: HybridConfig) -> Target:
    """The same target without the sizes that stay the parent's."""
    changed = {
        name: getattr(target, name)
        for name, size in sizes_of(parent).items()
        if getattr(target, name) != size
    }
    return Target(drop_layers=target.drop_layers, **changed)


class _Judge:
    """Which layers go, and what a shape loses: measured where there are scores, else by rule and prior."""

    def __init__(self, parent: HybridConfig, importance: Importance | None) -> None:
        self.parent, self.importance = parent, importance
        if importance is not None:
            importance.check(parent)
        self.ranked = importance is not None and len(importance.order) == parent.num_hidden_layers
        self.promise = Promise(parent, importance) if importance is not None else None
        self.estimate = PRIOR if importance is None else MEASURED if self.ranked else MEASURED_WIDTHS
        self.known: dict[int, tuple[int, ...]] = {}

    def named(self, target: Target) -> Target:
        """The same shape with its layers named."""
        layers = target.layers or self.parent.num_hidden_layers
        if layers not in self.known:
            self.known[layers] = self._gone(layers)
        return replace(target, layers=None, drop_layers=self.known[layers])

    def _gone(self, layers: int) -> tuple[int, ...]:
        if self.ranked:
            assert self.importance is not None
            return tuple(sorted(self.importance.order[: self.parent.num_hidden_layers - layers]))
        return layers_to_drop(self.parent.pattern, layers)

    def lost(self, target: Target) -> float:
        if self.promise is None:
            return prior(self.parent, target)
        if self.ranked:
            return self.promise.lost(target)
        return self.promise.lost(replace(target, layers=None)) + prior(
            self.parent, Target(layers=target.layers)
        )


def prior(parent: HybridConfig, target: Target) -> float:
    """The weighted share of each axis that goes, added up: 0 for the whole model."""
    return sum(
        WEIGHTS[name] * (1 - (getattr(target, name) or size) / size)
        for name, size in sizes_of(parent).items()
    )
