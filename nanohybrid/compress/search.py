"""The search for a shape: of all shapes of a grid that fit the budget, the most promising are pruned and
evaluated.

A shape is not evaluated where another one that fits is at least as large on every axis, since it could only
be worse. The others are evaluated in the order of the importance-loss proxy (prune/importance_loss.py), and
ranked by their loss on calibration documents, without retraining. Successive halving (successive_halving.py)
can then distill the best of them a little. Of the candidates whose quality is within a tolerance of the best
one's, the fastest is selected. The search is deterministic: the same model, documents, grid and speeds give
the same selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar

from nanohybrid.compress.candidate_quality import CandidateQuality, QualityEvaluator
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import Budget, within
from nanohybrid.model import HybridLM
from nanohybrid.model.mixers import PrunableAxis
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.prunable import known_axes, prunable_axes, unit_of
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.target import Target, sizes_of

Speed = Callable[[HybridConfig], float]


def shape_of(config: HybridConfig) -> dict[str, int]:
    """What a search changes of a model: the number of layers, and the size of each prunable axis."""
    return {"num_hidden_layers": config.num_hidden_layers, **sizes_of(config)}


@dataclass(frozen=True)
class Grid:
    """The shapes that are enumerated: all combinations of numbers of layers and of fractions of each axis."""

    drop_layers: tuple[int, ...] = (0,)
    """How many layers go."""
    fractions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Axis -> fractions of the base model's size, as {"intermediate_size": [1.0, 0.5]}, rounded to a size
    that is possible. An axis that is not named has those that its mixer declares (PrunableAxis.fractions)."""
    multiple: int = 8
    """Sizes of the hidden size, the FFN width and the channels of a head are multiples of this."""
    max_evaluated: int = 16
    """At most so many shapes are pruned and evaluated, those that lose least importance first."""

    RENAMED: ClassVar[dict[str, str]] = {
        "tried": "max_evaluated",
        "hidden": "fractions.hidden_size",
        "ffn": "fractions.intermediate_size",
        "mamba_heads": "fractions.mamba_num_heads",
        "mamba_channels": "fractions.mamba_head_dim",
        "attention_heads": "fractions.num_attention_heads",
    }

    def __post_init__(self) -> None:
        given = {name.replace("-", "_"): tuple(values) for name, values in self.fractions.items()}
        known = known_axes()
        axes = {name: one.fractions for name, one in known.items()} | given
        object.__setattr__(self, "fractions", axes)
        named = {"drop_layers": self.drop_layers, **axes}
        empty = [name for name, values in named.items() if not values]
        if empty or self.multiple < 1 or self.max_evaluated < 1:
            raise ConfigError(
                f"grid: {', '.join(empty) or 'multiple and max_evaluated'}: give at least one value, "
                "and positive numbers"
            )
        if min(self.drop_layers) < 0:
            raise ConfigError(
                f"grid: drop_layers is {list(self.drop_layers)}: give how many layers may go, each 0 or more"
            )
        for name, values in axes.items():
            if name not in known:
                raise ConfigError(
                    f"grid: fractions names {name!r}: the axes that can be pruned are {', '.join(known)}"
                )
            if not all(0 < fraction <= 1 for fraction in values):
                raise ConfigError(
                    f"grid: fractions of {name} are {list(values)}: give numbers above 0 and at most 1"
                )

    def of(self, axis: str) -> tuple[float, ...]:
        """The fractions of an axis."""
        return self.fractions[axis]


@dataclass(frozen=True)
class Candidate:
    """A shape that fits the budget.

    bytes: of the model at inference, by what they hold. importance_loss: the proxy. tokens_per_second: of a
    decode step, all sequences together. loss, agreement: without retraining, None where it was not evaluated.
    distilled_kl: its divergence from the teacher after a short distillation, in nats a token, None where
    there was none.
    """

    target: Target
    config: HybridConfig
    parameters: int
    bytes: dict[str, int]
    importance_loss: float
    tokens_per_second: float = 0.0
    loss: float | None = None
    agreement: float | None = None
    distilled_kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        shape = {"pattern": self.config.pattern, **shape_of(self.config)}
        names = ("parameters", "bytes", "tokens_per_second", "loss", "agreement", "distilled_kl")
        return {
            "config": shape,
            **{name: getattr(self, name) for name in names},
            "importance_lost": self.importance_loss,
        }


@dataclass(frozen=True)
class Search:
    """The candidates, the best first and those that were not evaluated last, and how many shapes were too
    large."""

    candidates: tuple[Candidate, ...]
    rejected: int

    @property
    def selected(self) -> Candidate:
        """The first candidate."""
        return self.candidates[0]


def enumerate_shapes(
    config: HybridConfig, importance: Importance, grid: Grid, budget: Budget, speed: Speed | None = None
) -> Search:
    """Every shape of the grid that fits the budget, by the importance-loss proxy. Raises InputError where
    none fits.

    speed: tokens a second of a shape; without it 0 for all.
    """
    proxy, rate = ImportanceLoss(config, importance), speed or (lambda _: 0.0)
    found, rejected = within(
        budget, config, ((target, target.config(config, importance)) for target in targets(config, grid))
    )
    fitting = [
        Candidate(
            target, shape, Footprint.of(shape).parameters, memory.as_dict(), proxy.of(target), rate(shape)
        )
        for target, shape, memory in found
    ]
    return Search(tuple(sorted(fitting, key=lambda c: (c.importance_loss, numbers(c.target)))), rejected)


def search(
    model: HybridLM | StreamedModel,
    importance: Importance,
    evaluator: QualityEvaluator,
    grid: Grid,
    found: Search,
    advance: Callable[[int], object] | None = None,
    known: dict[str, CandidateQuality] | None = None,
) -> Search:
    """Prune to the most promising of the shapes that fit and rank them by their loss, the lowest first.

    model: the base model, in memory or streamed. known: qualities by the key of a candidate, read and filled,
    so that an interrupted search evaluates none twice. Shapes that were not evaluated follow.
    """
    known = {} if known is None else known
    chosen: list[Candidate] = []
    rest: list[Candidate] = []
    for candidate in found.candidates:
        if len(chosen) < grid.max_evaluated and not dominated(candidate, found.candidates):
            chosen.append(candidate)
        else:
            rest.append(candidate)
    ranked = []
    for candidate in chosen:
        key = key_of(candidate)
        if key not in known:
            known[key] = evaluator(pruned(model, candidate.target.select(model.config, importance)))
        ranked.append(replace(candidate, loss=known[key].loss, agreement=known[key].agreement))
        if advance is not None:
            advance(1)
    ranked.sort(key=lambda c: (c.loss, -c.parameters, numbers(c.target)))
    return Search((*ranked, *rest), found.rejected)


def pruned(model: HybridLM | StreamedModel, selection: Selection) -> HybridLM | StreamedModel:
    """A model pruned to a selection: in memory, or sliced as it is read."""
    return prune_model(model, selection) if isinstance(model, HybridLM) else model.pruned(selection)


def select(found: Search, tolerance: float) -> Search:
    """The same search with the selected candidate first: the fastest of those whose quality is close to the
    best one's.

    tolerance: relative. Quality is the divergence after a short distillation where the first candidate has
    one, else the loss without retraining.
    """
    distilled = found.selected.distilled_kl is not None
    quality = {
        id(c): value
        for c in found.candidates
        if (value := c.distilled_kl if distilled else c.loss) is not None
    }
    best = min(quality.values())
    close = [c for c in found.candidates if quality.get(id(c), math.inf) <= best * (1 + tolerance)]
    selected = max(close, key=lambda c: (c.tokens_per_second, -quality[id(c)], c.parameters))
    return Search((selected, *(c for c in found.candidates if c is not selected)), found.rejected)


def key_of(candidate: Candidate) -> str:
    """A name for a shape, in logs and of directories: the number of layers and the sizes of its target."""
    return "-".join(map(str, numbers(candidate.target)))


def targets(config: HybridConfig, grid: Grid) -> Iterable[Target]:
    """The grid's shapes for a model, each once; axes that the model does not have are left out."""
    count = config.num_hidden_layers
    layers = [count - gone for gone in grid.drop_layers if 0 <= gone < count]
    axes = prunable_axes(config.pattern)
    options = [
        widths(getattr(config, name), grid.of(name), multiple_of(config, axis, grid))
        for name, axis in axes.items()
    ]
    for left, *sizes in product(layers, *options):
        yield Target(layers=left, sizes=dict(zip(axes, sizes, strict=True)))


def multiple_of(config: HybridConfig, axis: PrunableAxis, grid: Grid) -> int:
    """The number that the sizes tried of an axis are multiples of."""
    unit, _ = unit_of(config, axis.axis)
    return math.lcm(unit, grid.multiple) if axis.multiple else unit


def widths(size: int, fractions: Iterable[float], multiple: int) -> list[int]:
    """Fractions of a size as multiples, each once, the whole size unchanged."""
    found = [
        size if fraction == 1 else min(size, max(multiple, round(size * fraction / multiple) * multiple))
        for fraction in fractions
    ]
    return list(dict.fromkeys(found))


def numbers(target: Target) -> tuple[int, ...]:
    """A target of `targets` as numbers, to compare it by: its layers, and the size of each axis."""
    return (-1 if target.layers is None else target.layers, *target.sizes.values())


def dominated(candidate: Candidate, others: Iterable[Candidate]) -> bool:
    """Whether another one that fits is at least as large on every axis."""
    mine = numbers(candidate.target)
    return any(
        mine != numbers(o.target) and all(a <= b for a, b in zip(mine, numbers(o.target), strict=True))
        for o in others
    )
