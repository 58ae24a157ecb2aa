"""Which shape to prune to: of all shapes of a grid that fit the budget, the most promising are pruned and tried without retraining.

A shape is not tried where another one that fits is at least as large on every axis: it could only be worse. The others are tried in the
order of the importance that they lose (promise.py), and ranked by their loss on calibration documents; where a few are to be told apart
more surely, race.py lets the best of them learn a little. Among those as good as the best, the fastest is chosen. No chance is involved:
the same model, documents, grid and speeds give the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from nanohybrid.compress.candidate_quality import Judge, Quality
from nanohybrid.config import ATTENTION, MAMBA, MLP, HybridConfig
from nanohybrid.errors import ConfigError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import Budget, within
from nanohybrid.model import HybridLM
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.importance_loss import Promise
from nanohybrid.prune.layerwise import Stored
from nanohybrid.prune.selection import Kept
from nanohybrid.prune.slicing import prune_model
from nanohybrid.prune.target import Target

Speed = Callable[[HybridConfig], float]
SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "num_attention_heads",
)


@dataclass(frozen=True)
class Grid:
    """What is enumerated: layers to drop as numbers, every width as fractions of the parent's, rounded to a multiple that works."""

    drop_layers: tuple[int, ...] = (0,)
    hidden: tuple[float, ...] = (1.0, 0.9375, 0.875, 0.8125, 0.75)
    ffn: tuple[float, ...] = (1.0, 0.875, 0.75, 0.6875, 0.625, 0.5625, 0.5)
    mamba_heads: tuple[float, ...] = (1.0,)
    mamba_channels: tuple[float, ...] = (1.0, 0.875, 0.75)
    attention_heads: tuple[float, ...] = (1.0,)
    multiple: int = 8
    """Hidden width, FFN width and channels of a head are multiples of this."""
    tried: int = 16
    """Shapes that are pruned and tried, the most promising first."""

    def __post_init__(self) -> None:
        axes = {name: value for name, value in asdict(self).items() if isinstance(value, tuple)}
        empty = [name for name, values in axes.items() if not values]
        if empty or self.multiple < 1 or self.tried < 1:
            raise ConfigError(
                f"grid: {', '.join(empty) or 'multiple and tried'}: give at least one value, and positive numbers"
            )
        if min(self.drop_layers) < 0:
            raise ConfigError(
                f"grid: drop_layers is {list(self.drop_layers)}: give how many layers may go, each 0 or more"
            )
        for name, values in axes.items():
            if name != "drop_layers" and not all(0 < share <= 1 for share in values):
                raise ConfigError(
                    f"grid: {name} is {list(values)}: fractions of the parent's width are above 0 and at most 1"
                )


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
        shape = {name: getattr(self.config, name) for name in ("pattern", *SHAPE)}
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
    promise, rate = Promise(config, importance), speed or (lambda _: 0.0)
    found, rejected = within(
        budget, config, ((target, target.config(config, importance)) for target in targets(config, grid))
    )
    fitting = [
        Candidate(
            target, shape, Footprint.of(shape).parameters, memory.as_dict(), promise.lost(target), rate(shape)
        )
        for target, shape, memory in found
    ]
    return Search(tuple(sorted(fitting, key=lambda c: (c.lost, sizes(c.target)))), rejected)


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
            known[key] = judge(cut(model, candidate.target.kept(model.config, importance)))
        ranked.append(replace(candidate, loss=known[key].loss, agreement=known[key].agreement))
        if advance is not None:
            advance(1)
    ranked.sort(key=lambda c: (c.loss, -c.parameters, sizes(c.target)))
    return Search((*ranked, *rest), found.rejected)


def cut(model: HybridLM | Stored, kept: Kept) -> HybridLM | Stored:
    """What remains of a model, in memory or as it is read."""
    return prune_model(model, kept) if isinstance(model, HybridLM) else model.cut(kept)


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
    """A name for a shape, in logs and of directories."""
    return "-".join("x" if size < 0 else str(size) for size in sizes(candidate.target))


def targets(config: HybridConfig, grid: Grid) -> Iterable[Target]:
    """The grid's shapes for a model, each once; axes of mixers that the model lacks are left alone."""
    kinds = set(config.pattern)
    head_channels = (
        widths(config.mamba_head_dim, grid.mamba_channels, grid.multiple) if MAMBA in kinds else [None]
    )
    axes: tuple[Sequence[int | None], ...] = (
        [
            config.num_hidden_layers - gone
            for gone in grid.drop_layers
            if 0 <= gone < config.num_hidden_layers
        ],
        widths(config.hidden_size, grid.hidden, grid.multiple),
        widths(config.intermediate_size, grid.ffn, grid.multiple) if MLP in kinds else [None],
        widths(config.mamba_num_heads, grid.mamba_heads, config.n_groups) if MAMBA in kinds else [None],
        head_channels,
        widths(config.num_attention_heads, grid.attention_heads, config.num_key_value_heads)
        if ATTENTION in kinds
        else [None],
    )
    for layers, hidden, ffn, heads, channels, queries in product(*axes):
        yield Target(
            layers=layers,
            hidden_size=hidden,
            intermediate_size=ffn,
            mamba_heads=heads,
            mamba_head_dim=channels,
            attention_heads=queries,
        )


def widths(parent: int, shares: Iterable[float], multiple: int) -> list[int]:
    """Fractions of a width as multiples, each once, the parent's own width as it is."""
    found = [
        parent if share == 1 else min(parent, max(multiple, round(parent * share / multiple) * multiple))
        for share in shares
    ]
    return list(dict.fromkeys(found))


def sizes(target: Target) -> tuple[int, ...]:
    """A shape as numbers, to compare and to name it by."""
    values = (
        target.layers,
        target.hidden_size,
        target.intermediate_size,
        target.mamba_heads,
        target.mamba_head_dim,
        target.attention_heads,
    )
    return tuple(-1 if value is None else value for value in values)


def dominated(candidate: Candidate, others: Iterable[Candidate]) -> bool:
    """Whether another one that fits is at least as large on every axis."""
    mine = sizes(candidate.target)
    return any(
        mine != sizes(o.target) and all(a <= b for a, b in zip(mine, sizes(o.target), strict=True))
        for o in others
    )
