"""Successive halving: the best of the shapes tried learn from the parent a little, the better half goes on, for twice the tokens.

What a shape loses at the cut is not what it has lost for good, and a short distillation tells (rankings settle within some hundred
steps: Muralidharan et al. 2024). Each round is a stage of its own, so a kill loses what is since the last snapshot and no more; a round
that was measured is not run again. A shape goes on from where its last round ended. The order of equals is that of the search.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nanohybrid.compress.search import Candidate, Search, key_of
from nanohybrid.errors import ConfigError

Learn = Callable[[Candidate, Path | None, Path, int], float]


@dataclass(frozen=True)
class RaceRecipe:
    """How many shapes learn before one is chosen, and how much."""

    entrants: int = 1
    """Shapes that enter, the best of those tried; 1: no race, what is lost at the cut decides."""
    tokens: int = 100_000
    """Tokens of each in the first round; twice as many in every further one."""

    def __post_init__(self) -> None:
        if min(self.entrants, self.tokens) < 1:
            raise ConfigError("race: entrants and tokens must be at least 1")

    def rounds(self, entrants: int) -> Iterator[tuple[int, int]]:
        """Of each round: how many run in it, and the tokens of each."""
        tokens = self.tokens
        while entrants > 1:
            yield entrants, tokens
            entrants, tokens = (0 if entrants == 2 else -(-entrants // 2)), 2 * tokens


def race(
    recipe: RaceRecipe, found: Search, folder: Path, learn: Learn, known: dict[tuple[int, str], float]
) -> Search:
    """The same search with the finalists first, the nearest to the parent leading, then the others in the order in which they fell.

    learn(candidate, start, out, tokens): distils a candidate, from the checkpoint `start` or (None) from the cut, into `out`, and gives
    its divergence from the parent. known: divergences by round and shape, read and filled.
    """
    tried = [candidate for candidate in found.candidates if candidate.loss is not None]
    field, fallen = tried[: recipe.entrants], tried[recipe.entrants :]
    for number, (runners, tokens) in enumerate(recipe.rounds(len(field))):
        field, slower = field[:runners], field[runners:]
        fallen = [*slower, *fallen]
        ran = []
        for candidate in field:
            key = key_of(candidate)
            here, before = (folder / f"round-{n}" / key for n in (number, number - 1))
            if (number, key) not in known:
                known[number, key] = learn(candidate, before if number else None, here, tokens)
            ran.append(replace(candidate, healed=known[number, key]))
        field = sorted(ran, key=lambda candidate: float(candidate.healed or 0.0))
        if number:
            shutil.rmtree(folder / f"round-{number - 1}", ignore_errors=True)
    rest = [candidate for candidate in found.candidates if candidate.loss is None]
    return Search((*field, *fallen, *rest), found.rejected)
