"""Successive halving among shapes."""

from dataclasses import replace

import pytest

from nanohybrid.compress.search import Grid, Search, enumerate_shapes, key_of
from nanohybrid.compress.successive_halving import RaceRecipe, race
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
                    candidate if candidate.healed is None else replace(candidate, healed=None)
                )
            )
            + 1000 / tokens
        )

    return learn


def test_the_better_half_goes_on_for_twice_the_tokens(found, tmp_path):
    log = []
    result = race(RaceRecipe(4, 100), found, tmp_path, runner(found, [2, 1, 3, 0, 4, 5], log), {})
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
        result.chosen.healed == 0 + 1000 / 200
        and result.candidates[4].healed is None
        and result.rejected == 3
    )
    assert sorted(map(key_of, result.candidates)) == sorted(keys)


def test_a_race_that_was_measured_is_not_run_again(found, tmp_path):
    known, log = {}, []
    first = race(RaceRecipe(4, 100), found, tmp_path / "a", runner(found, [2, 1, 3, 0, 4, 5], log), known)
    assert (
        race(RaceRecipe(4, 100), found, tmp_path / "b", lambda *_: pytest.fail("it learns again"), known)
        == first
    )


@pytest.mark.parametrize(
    ("entrants", "rounds"), [(1, []), (2, [2]), (3, [3, 2]), (8, [8, 4, 2]), (5, [5, 3, 2])]
)
def test_the_field_is_halved_until_two_are_left(entrants, rounds):
    assert [runners for runners, _ in RaceRecipe(entrants).rounds(entrants)] == rounds


def test_a_race_of_none_is_refused():
    with pytest.raises(ConfigError, match="race"):
        RaceRecipe(entrants=0)
