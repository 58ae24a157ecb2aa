"""`plan compress`: every shape of a grid that fits a budget, with its bytes, its speed and an estimate of its
quality.

No weight is read. Where nothing was measured, the estimate is a prior: the share of each axis that goes,
weighted by what the paper's tables say an axis costs (WEIGHTS), added up. It orders shapes and predicts no
accuracy. With a file of importance scores it is the share of the model's measured importance that goes
(prune/importance_loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nanohybrid.compress.search import Grid, shape_of, targets
from nanohybrid.config import HybridConfig
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import Budget, Memory, within
from nanohybrid.estimate.devices import Device
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.presets import PRESETS
from nanohybrid.prune.depth_rule import applies_to, layers_to_drop
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.target import Target, sizes_of

PAPER = Grid(
    drop_layers=(6, 8, 10),  # of 62: 56, 54, 52
    fractions={
        "hidden_size": tuple(k / 32 for k in range(32, 27, -1)),  # 5120 down to 4480
        "intermediate_size": tuple(k / 64 for k in range(64, 41, -1)),  # 20480 down to 13440
        "mamba_num_heads": (1.0, 0.9375, 0.875),  # 128, 120, 112
        "mamba_head_dim": (1.0,),
    },
)
# What losing all of an axis costs; 1 where none is given. Depth: 56, 54 and 52 layers score 51.48, 47.35 and
# 44.92 in the paper. Mamba heads: 112 of 128 with a wider FFN score 4 points less than 128 with a narrower one.
LAYERS_WEIGHT = 4.0
WEIGHTS = {"mamba_num_heads": 2.0, "mamba_head_dim": 2.0}
PRIOR = (
    "prior: 1 minus the weighted share of each axis that goes (layers 4, Mamba heads 2, all others "
    "1, after the paper's tables); "
    "an order of shapes, no prediction of accuracy, and nothing of these weights is known"
)
MEASURED = (
    "importance: 1 minus the share of the measured importance that goes, added over the axes; "
    "nothing was retrained"
)
MEASURED_WIDTHS = (
    MEASURED
    + "; these scores rank no layers, so depth is the prior's (4 times the share of layers that goes)"
)
NO_DEPTH = "; no layers go, since their order is known only by measured importance for this kind of pattern"


@dataclass(frozen=True)
class Shape:
    """A shape that fits. target: which layers go, by their number in the base model, and the sizes that
    change."""

    config: HybridConfig
    target: Target
    parameters: int
    memory: Memory
    tokens_per_second: float
    quality: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "config": {**shape_of(self.config), "pattern": self.config.pattern},
            "drop_layers": list(self.target.drop_layers),
            "parameters": self.parameters,
            "bytes": self.memory.as_dict(),
            "tokens_per_second_estimate": round(self.tokens_per_second, 2),
            "quality_estimate": round(self.quality, 6),
        }


@dataclass(frozen=True)
class Plan:
    """The shapes that fit, by the estimate of their quality; how many were too large; how the quality was
    estimated."""

    shapes: tuple[Shape, ...]
    rejected: int
    estimate: str


def grid_of(base: HybridConfig, other: Grid | None = None) -> Grid:
    """The paper's grid for the paper's base model; for any other `other`, else a wide and coarse one."""
    if base.pattern == PRESETS["nano-12b-v2"]["pattern"]:
        return PAPER
    layers = base.num_hidden_layers
    return other or Grid(
        drop_layers=tuple(dict.fromkeys(2 * round(layers * share / 2) for share in (0, 0.1, 0.2))),
        fractions={
            "hidden_size": tuple(k / 16 for k in range(16, 11, -1)),
            "intermediate_size": tuple(k / 16 for k in range(16, 7, -1)),
            "mamba_num_heads": (1.0, 0.875, 0.75),
            "mamba_head_dim": (1.0,),
        },
    )


def plan(
    base: HybridConfig,
    budget: Budget,
    device: Device,
    importance: Importance | None = None,
    grid: Grid | None = None,
) -> Plan:
    """Every shape of the grid, and the whole model, that fits the budget. Raises InputError where none
    does."""
    estimate = _Estimate(base, importance)
    named = [(target, estimate.named(target)) for target in _targets(base, grid or grid_of(base), estimate)]
    found, rejected = within(
        budget, base, (((target, name), name.config(base, importance)) for target, name in named)
    )
    fitting = []
    for (target, name), config, memory in found:
        speed = decode_step(config, budget).tokens_per_second(device)
        count = Footprint.of(config).parameters
        fitting.append(Shape(config, _changes(name, base), count, memory, speed, 1 - estimate.lost(target)))
    fitting.sort(
        key=lambda shape: (-shape.quality, -shape.parameters, tuple(shape_of(shape.config).values()))
    )
    return Plan(tuple(fitting), rejected, estimate.name)


def _targets(base: HybridConfig, grid: Grid, estimate: _Estimate) -> Iterator[Target]:
    """The whole model, then the grid's shapes; those that lose layers only where it is known which ones."""
    yield Target(layers=base.num_hidden_layers)
    for target in targets(base, grid):
        if _changes(target, base) != Target() and (
            estimate.knows_depth or target.layers == base.num_hidden_layers
        ):
            yield target


def _changes(target: Target, base: HybridConfig) -> Target:
    """The same target without what stays as it is in the base model."""
    return Target(
        layers=None if target.layers == base.num_hidden_layers else target.layers,
        drop_layers=target.drop_layers,
        sizes={name: size for name, size in target.sizes.items() if size != getattr(base, name)},
    )


class _Estimate:
    """Which layers go, and what a shape loses: measured where there are scores, else by the depth rule and
    the prior."""

    def __init__(self, base: HybridConfig, importance: Importance | None) -> None:
        self.base, self.importance = base, importance
        if importance is not None:
            importance.check(base)
        self.ranked = importance is not None and len(importance.order) == base.num_hidden_layers
        self.proxy = ImportanceLoss(base, importance) if importance is not None else None
        self.knows_depth = self.ranked or applies_to(base.pattern)
        self.name = PRIOR if importance is None else MEASURED if self.ranked else MEASURED_WIDTHS
        self.name += "" if self.knows_depth else NO_DEPTH
        self._known: dict[int, tuple[int, ...]] = {}

    def named(self, target: Target) -> Target:
        """The same shape with its layers named."""
        layers = target.layers or self.base.num_hidden_layers
        if layers not in self._known:
            self._known[layers] = self._gone(layers)
        return replace(target, layers=None, drop_layers=self._known[layers])

    def _gone(self, layers: int) -> tuple[int, ...]:
        if layers == self.base.num_hidden_layers:
            return ()
        if self.ranked:
            assert self.importance is not None
            return tuple(sorted(self.importance.order[: self.base.num_hidden_layers - layers]))
        return layers_to_drop(self.base.pattern, layers)

    def lost(self, target: Target) -> float:
        if self.proxy is None:
            return prior(self.base, target)
        if self.ranked:
            return self.proxy.of(target)
        return self.proxy.of(replace(target, layers=None)) + prior(self.base, Target(layers=target.layers))


def prior(base: HybridConfig, target: Target) -> float:
    """The weighted share of each axis that goes, added up: 0 for the whole model."""
    count = base.num_hidden_layers
    shares = [LAYERS_WEIGHT * (1 - (target.layers or count) / count)]
    for name, size in sizes_of(base).items():
        shares.append(WEIGHTS.get(name, 1.0) * (1 - target.size_of(name, base) / size))
    return sum(shares)
