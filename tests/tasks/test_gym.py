"""The adapter to reasoning-gym, where it is installed."""

import random

import pytest

from nanohybrid import tasks
from nanohybrid.errors import InputError

pytest.importorskip("reasoning_gym")


def test_a_generator_is_a_task_scored_by_its_own_rule() -> None:
    task = tasks.get("gym/leg_counting")
    assert isinstance(task, tasks.Task) and task.difficulties[0] == 0
    problem = task.make(random.Random(3), 1)
    assert problem == task.make(random.Random(3), 1)
    assert problem.trace == "" and problem.family == "gym/leg_counting"
    assert task.verify(problem, f"some thought</think>\n{problem.answer}\n") == 1.0
    assert task.verify(problem, "a horse") < 0.1


def test_generators_have_a_test_split_too() -> None:
    task = tasks.get("gym/basic_arithmetic")
    for split in ("train", "test"):
        assert tasks.split_of(task.make(random.Random(0), 0, split).prompt) == split


def test_unknown_generators_and_levels_are_refused() -> None:
    with pytest.raises(InputError, match="no generator 'chess_boxing'"):
        tasks.get("gym/chess_boxing")
    with pytest.raises(InputError, match="not 999"):
        tasks.get("gym/leg_counting").make(random.Random(0), 999)
