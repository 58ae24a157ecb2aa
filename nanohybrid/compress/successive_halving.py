"""Successive halving: the best candidates are distilled a little, and the better half goes on, with twice the
tokens.

The loss right after pruning does not tell how much of it distillation recovers. A short distillation does:
rankings settle within some hundred steps (Muralidharan et al. 2024). Each round is a stage of its own, so a
kill loses the work since the last snapshot, and a round that was measured is not run again. A candidate
continues from the checkpoint of its last round. Candidates with equal results stay in the order of the
search.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from nanohybrid.compress.search import Candidate, Search, key_of
from nanohybrid.errors import ConfigError

Distill = Callable[[Candidate, Path | None, Path, int], float]


@dataclass(frozen=True)
class SuccessiveHalvingRecipe:
    """How many candidates are distilled before one is selected, and how much. Raises ConfigError for numbers
    below 1."""

    num_candidates: int = 1
    """Candidates in the first round, the best of those that were evaluated. 1: none is distilled, and the
    loss decides."""
    tokens: int = 100_000
    """Tokens of each candidate in the first round; twice as many in each further round."""

    RENAMED: ClassVar[dict[str, str]] = {"entrants": "num_candidates"}

    def __post_init__(self) -> None:
        if min(self.num_candidates, self.tokens) < 1:
            raise ConfigError("successive_halving: num_candidates and tokens must be at least 1")

    def rounds(self, candidates: int) -> Iterator[tuple[int, int]]:
        """Of each round: how many candidates it has, and the tokens of each."""
        tokens = self.tokens
        while candidates > 1:
            yield candidates, tokens
            candidates, tokens = (0 if candidates == 2 else -(-candidates // 2)), 2 * tokens


def successive_halving(
    recipe: SuccessiveHalvingRecipe,
    found: Search,
    folder: Path,
    distill: Distill,
    known: dict[tuple[int, str], float],
) -> Search:
    """The same search, with the finalists first, by their divergence, then the others, the last to be
    eliminated first.

    distill(candidate, start, out, tokens): distills a candidate into `out`, from the checkpoint `start` or,
    where that is None, from the pruned model, and returns its divergence from the teacher. known: divergences
    by round and candidate, read and filled. folder: of the checkpoints of the rounds.
    """
    evaluated = [candidate for candidate in found.candidates if candidate.loss is not None]
    active, eliminated = evaluated[: recipe.num_candidates], evaluated[recipe.num_candidates :]
    for number, (count, tokens) in enumerate(recipe.rounds(len(active))):
        active, slower = active[:count], active[count:]
        eliminated = [*slower, *eliminated]
        distilled = []
        for candidate in active:
            key = key_of(candidate)
            here, before = (folder / f"round-{n}" / key for n in (number, number - 1))
            if (number, key) not in known:
                known[number, key] = distill(candidate, before if number else None, here, tokens)
            distilled.append(replace(candidate, distilled_kl=known[number, key]))
        active = sorted(distilled, key=lambda candidate: float(candidate.distilled_kl or 0.0))
        if number:
            shutil.rmtree(folder / f"round-{number - 1}", ignore_errors=True)
    rest = [candidate for candidate in found.candidates if candidate.loss is None]
    return Search((*active, *eliminated, *rest), found.rejected)
