"""The data mixture: phases of a run, each with weights of the stores by tokens (paper, section 2: switches at
60 % and 90 %).

The mixture gives the number of tokens of each store in the first k steps; the loader derives the batches from
it.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """A phase of the run."""

    until: float
    """Fraction of the run at which the phase ends."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each store, or group of stores, in tokens; only their ratios matter."""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ConfigError(
                f"until is {self.until}; a phase ends at a fraction of the run above 0 and at most 1"
            )
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ConfigError(f"the weight of {name} is {weight}; give a number of 0 or more")
        if not sum(self.weights.values()) > 0:
            raise ConfigError(
                f"the phase until {self.until} has no weight above 0; give it at least one store"
            )

    @property
    def shares(self) -> dict[str, float]:
        """The weights, normalized to a sum of 1; stores of weight 0 are left out."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items() if weight > 0}


@dataclass(frozen=True)
class Mixture:
    """Consecutive phases; the last one ends at 1. Raises ConfigError for others."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
            raise ConfigError(f"phases end at {ends}; their ends must rise, and the last must be 1.0")

    @classmethod
    def of(cls, phases: Iterable[tuple[float, Mapping[str, float]]]) -> "Mixture":
        """A mixture from pairs of (until, weights)."""
        return cls(tuple(Phase(until, dict(weights)) for until, weights in phases))

    @property
    def names(self) -> list[str]:
        """All stores of all phases, in order of their first use."""
        return list(dict.fromkeys(name for phase in self.phases for name in phase.shares))

    def among(self, stores: Collection[str]) -> "Mixture":
        """The mixture over `stores`: the weight of a group (`tasks`) is divided equally among its members
        (`tasks-sums`, ...).

        Raises ConfigError for a name that is neither a store nor a group.
        """
        return Mixture(tuple(Phase(phase.until, _spread(phase.weights, stores)) for phase in self.phases))

    def tokens_before(self, step: int, total_steps: int, batch_tokens: int) -> dict[str, float]:
        """Number of tokens of each store in the steps before `step`, with fractions."""
        tokens = dict.fromkeys(self.names, 0.0)
        begin = 0
        for phase in self.phases:
            last = phase is self.phases[-1]
            end = step if last else min(step, round(phase.until * total_steps))
            for name, share in phase.shares.items():
                tokens[name] += share * batch_tokens * max(0, end - begin)
            begin = max(begin, end)
        return tokens


def _spread(weights: Mapping[str, float], stores: Collection[str]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, weight in weights.items():
        members = [name] if name in stores else [store for store in stores if store.startswith(name + "-")]
        if not members:
            raise ConfigError(
                f"the mixture names {name}, which is not among the stores {', '.join(sorted(stores))}"
            )
        for member in members:
            result[member] = result.get(member, 0.0) + weight / len(members)
    return result
