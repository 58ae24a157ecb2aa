"""Successive halving among shapes."""

from dataclasses import replace

import pytest

from nanohybrid.compress.search import Grid, Search, enumerate_shapes, key_of
from nanohybrid.compress.successive_halving import SuccessiveHalvingRecipe, successive_halving
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.budget import Budget
from nanohybrid.prune.baselines import random

GRID = Grid(multiple=4, fractions={"hidden_size": (1.0, 0.75), "intermediate_size": (1.0, 0.75, 0.5)})


@pytest.fixture
def found(model):
    fitting = enumerate_shapes(model.config, random(model.config, 0), GRID, Budget(10**9)).candidates
    tried = [replace(candidate, loss=float(place)) for place, candidate in enumerate(fitting[:6])]
    return Search((*tried, *fitting[6:]), 3)


def runner(found, order, log):
    """Learning that ends in a divergence by a wanted order of finish, the nearer the more tokens it had."""

    def learn(candidate, start, out, tokens):
        out.mkdir(parents=True)
        log.append((key_of(candidate), start, tokens))
        assert start is None or start.is_dir()
        return (
            order.index(
                found.candidates.index(
                    candidate if candidate.distilled_kl is None else replace(candidate, distilled_kl=None)
                )
            )
            + 1000 / tokens
        )

    return learn


def test_successive_halving_continues_the_better_half_with_twice_the_tokens(found, tmp_path):
    log = []
    result = successive_halving(
        SuccessiveHalvingRecipe(4, 100), found, tmp_path, runner(found, [2, 1, 3, 0, 4, 5], log), {}
    )
    keys = [key_of(c) for c in found.candidates]
    assert [(keys.index(key), tokens) for key, _, tokens in log] == [
        (0, 100),
        (1, 100),
        (2, 100),
        (3, 100),
        (2, 200),
        (1, 200),
    ]
    assert [start is None for _, start, _ in log] == [True] * 4 + [False] * 2
    assert [keys.index(key_of(c)) for c in result.candidates[:6]] == [2, 1, 3, 0, 4, 5]
    assert (
        result.selected.distilled_kl == 0 + 1000 / 200
        and result.candidates[4].distilled_kl is None
        and result.rejected == 3
    )
    assert sorted(map(key_of, result.candidates)) == sorted(keys)


def test_successive_halving_does_not_repeat_a_measured_round(found, tmp_path):
    known, log = {}, []
    first = successive_halving(
        SuccessiveHalvingRecipe(4, 100), found, tmp_path / "a", runner(found, [2, 1, 3, 0, 4, 5], log), known
    )
    assert (
        successive_halving(
            SuccessiveHalvingRecipe(4, 100),
            found,
            tmp_path / "b",
            lambda *_: pytest.fail("it learns again"),
            known,
        )
        == first
    )


@pytest.mark.parametrize(
    ("num_candidates", "rounds"), [(1, []), (2, [2]), (3, [3, 2]), (8, [8, 4, 2]), (5, [5, 3, 2])]
)
def test_successive_halving_rounds_end_with_two_candidates(num_candidates, rounds):
    assert [
        runners for runners, _ in SuccessiveHalvingRecipe(num_candidates).rounds(num_candidates)
    ] == rounds


def test_successive_halving_refuses_no_candidates():
    with pytest.raises(ConfigError, match="successive_halving"):
        SuccessiveHalvingRecipe(num_candidates=0)
