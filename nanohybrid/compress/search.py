"""Which shape to prune to: of all shapes of a grid that fit the budget, the most promising are pruned and tried without retraining.

A shape is not tried where another one that fits is at least as large on every axis: it could only be worse. The others are tried in the
order of the importance that they lose (promise.py), and ranked by their loss on calibration documents; where a few are to be told apart
more surely, race.py lets the best of them learn a little. Among those as good as the best, the fastest is chosen. No chance is involved:
the same model, documents, grid and speeds give the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import lcm
from typing import Any, ClassVar

from nanohybrid.compress.candidate_quality import Judge, Quality
from nanohybrid.config import HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import Budget, within
from nanohybrid.model import HybridLM
from nanohybrid.model.mixers import PrunableAxis
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import ImportanceLoss
from nanohybrid.prune.layerwise import Stored
from nanohybrid.prune.prunable import known_axes, prunable_axes, unit_of
from nanohybrid.prune.selection import Selection
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.target import Target, sizes_of

Speed = Callable[[HybridConfig], float]
WHOLE = (1.0,)
FRACTIONS: Mapping[str, tuple[float, ...]] = {
    "hidden_size": (1.0, 0.9375, 0.875, 0.8125, 0.75),
    "intermediate_size": (1.0, 0.875, 0.75, 0.6875, 0.625, 0.5625, 0.5),
    "mamba_head_dim": (1.0, 0.875, 0.75),
    "mamba_num_heads": WHOLE,
    "num_attention_heads": WHOLE,
}
"""What a grid tries of an axis that it does not name; one that is not here stays whole."""


def shape_of(config: HybridConfig) -> dict[str, int]:
    """What a search changes of a model: the number of layers, and the size of each prunable axis."""
    return {"num_hidden_layers": config.num_hidden_layers, **sizes_of(config)}


@dataclass(frozen=True)
class Grid:
    """The shapes that are enumerated: all combinations of numbers of layers and of fractions of each axis."""

    drop_layers: tuple[int, ...] = (0,)
    """How many layers go."""
    fractions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Axis -> fractions of the base model's size, as {"intermediate_size": [1.0, 0.5]}, rounded to a size that is possible.
    An axis that is not named has the fractions of FRACTIONS, else it stays whole."""
    multiple: int = 8
    """Sizes of the hidden size, the FFN width and the channels of a head are multiples of this."""
    tried: int = 16
    """Shapes that are pruned and evaluated, those that lose least importance first."""

    RENAMED: ClassVar[dict[str, str]] = {
        "hidden": "fractions.hidden_size",
        "ffn": "fractions.intermediate_size",
        "mamba_heads": "fractions.mamba_num_heads",
        "mamba_channels": "fractions.mamba_head_dim",
        "attention_heads": "fractions.num_attention_heads",
    }

    def __post_init__(self) -> None:
        given = {name.replace("-", "_"): tuple(values) for name, values in self.fractions.items()}
        axes = {**FRACTIONS, **given}
        object.__setattr__(self, "fractions", axes)
        named = {"drop_layers": self.drop_layers, **axes}
        empty = [name for name, values in named.items() if not values]
        if empty or self.multiple < 1 or self.tried < 1:
            raise ConfigError(
                f"grid: {', '.join(empty) or 'multiple and tried'}: give at least one value, and positive numbers"
            )
        if min(self.drop_layers) < 0:
            raise ConfigError(
                f"grid: drop_layers is {list(self.drop_layers)}: give how many layers may go, each 0 or more"
            )
        known = known_axes()
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
        return self.fractions.get(axis, WHOLE)


@dataclass(frozen=True)
class Candidate:
    """A shape that fits: the importance that it loses, tokens a second of a decode step, and its quality without retraining.

    loss, agreement: None where it was not tried. healed: its divergence from the parent after learning a little, in nats a token;
    None where it did not race.
    """

    target: Target
    config: HybridConfig
    parameters: int
    bytes: dict[str, int]
    lost: float
    tokens_per_second: float = 0.0
    loss: float | None = None
    agreement: float | None = None
    healed: float | None = None

    def as_dict(self) -> dict[str, Any]:
        shape = {"pattern": self.config.pattern, **shape_of(self.config)}
        names = ("parameters", "bytes", "tokens_per_second", "loss", "agreement", "healed")
        return {
            "config": shape,
            **{name: getattr(self, name) for name in names},
            "importance_lost": self.lost,
        }


@dataclass(frozen=True)
class Search:
    """What was found: the candidates, the best first and those not tried last, and how many shapes were too large."""

    candidates: tuple[Candidate, ...]
    rejected: int

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]


def enumerate_shapes(
    config: HybridConfig, importance: Importance, grid: Grid, budget: Budget, speed: Speed | None = None
) -> Search:
    """Every shape of the grid that fits the budget, the most promising first. Raises InputError where none does."""
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
    return Search(tuple(sorted(fitting, key=lambda c: (c.lost, numbers(c.target)))), rejected)


def search(
    model: HybridLM | Stored,
    importance: Importance,
    judge: Judge,
    grid: Grid,
    found: Search,
    advance: Callable[[int], object] | None = None,
    known: dict[str, Quality] | None = None,
) -> Search:
    """Of the shapes that fit, prune to the most promising and rank them by their loss, the lowest first; those not tried follow.

    model: in memory, or read layer by layer. known: qualities by the key of a candidate, read and filled, so that an interrupted search
    tries none twice.
    """
    known = {} if known is None else known
    tried: list[Candidate] = []
    rest: list[Candidate] = []
    for candidate in found.candidates:
        if len(tried) < grid.tried and not dominated(candidate, found.candidates):
            tried.append(candidate)
        else:
            rest.append(candidate)
    ranked = []
    for candidate in tried:
        key = key_of(candidate)
        if key not in known:
            known[key] = judge(cut(model, candidate.target.select(model.config, importance)))
        ranked.append(replace(candidate, loss=known[key].loss, agreement=known[key].agreement))
        if advance is not None:
            advance(1)
    ranked.sort(key=lambda c: (c.loss, -c.parameters, numbers(c.target)))
    return Search((*ranked, *rest), found.rejected)


def cut(model: HybridLM | Stored, selection: Selection) -> HybridLM | Stored:
    """What remains of a model, in memory or as it is read."""
    return prune_model(model, selection) if isinstance(model, HybridLM) else model.cut(selection)


def choose(found: Search, near: float) -> Search:
    """The same with the choice first: of those whose quality is within the share `near` of the best's, the fastest.

    Quality is the divergence after learning where the first candidate has one, else the loss without retraining.
    """
    healed = found.chosen.healed is not None
    measured = [c for c in found.candidates if (c.healed if healed else c.loss) is not None]
    quality = {id(c): float((c.healed if healed else c.loss) or 0.0) for c in measured}
    best = min(quality.values())
    as_good = [c for c in measured if quality[id(c)] <= best * (1 + near)]
    chosen = max(as_good, key=lambda c: (c.tokens_per_second, -quality[id(c)], c.parameters))
    return Search((chosen, *(c for c in found.candidates if c is not chosen)), found.rejected)


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
    return lcm(unit, grid.multiple) if axis.multiple else unit


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
