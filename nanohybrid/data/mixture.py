"""What a model reads when: phases of a run, each with weights by tokens, as in the paper (switches at 60 % and 90 %).

Plain Python: a mixture says how many tokens of each store the first k steps hold, and nothing else decides what a batch is.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """A part of the run."""

    until: float
    """The fraction of the run at which it ends."""
    weights: dict[str, float] = field(default_factory=dict)
    """The share of tokens from each store (or group of stores), in any unit."""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ConfigError(
                f"a phase lasts until a fraction of the run above 0 and at most 1, not {self.until}"
            )
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ConfigError(f"the weight of {name} is {weight}; give a number of 0 or more")
        if not sum(self.weights.values()) > 0:
            raise ConfigError(
                f"the phase until {self.until} has no weight above 0; give it something to read"
            )

    @property
    def shares(self) -> dict[str, float]:
        """The weights, summing to one; stores without weight are left out."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items() if weight > 0}


@dataclass(frozen=True)
class Mixture:
    """Phases one after another, the last of which ends at 1."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
            raise ConfigError(f"phases must end one after another and the last at 1.0; these end at {ends}")

    @classmethod
    def of(cls, phases: Iterable[tuple[float, Mapping[str, float]]]) -> "Mixture":
        """A mixture from pairs of (until, weights)."""
        return cls(tuple(Phase(until, dict(weights)) for until, weights in phases))

    @property
    def names(self) -> list[str]:
        """Every store that some phase reads, in the order in which they are named."""
        return list(dict.fromkeys(name for phase in self.phases for name in phase.shares))

    def among(self, stores: Collection[str]) -> "Mixture":
        """The same mixture over `stores`: a group's weight (`tasks`) is shared equally by its members (`tasks-sums`, ...)."""
        return Mixture(tuple(Phase(phase.until, _spread(phase.weights, stores)) for phase in self.phases))

    def tokens_before(self, step: int, total_steps: int, batch_tokens: int) -> dict[str, float]:
        """How many tokens of each store the steps before `step` hold."""
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
