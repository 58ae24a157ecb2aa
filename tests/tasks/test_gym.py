"""The adapter to reasoning-gym (skipped where it is not installed)."""

import random

import pytest

from nanohybrid import tasks
from nanohybrid.errors import InputError

pytest.importorskip("reasoning_gym")


def test_gym_task_scores_by_the_rule_of_its_generator() -> None:
    task = tasks.get("gym/leg_counting")
    assert isinstance(task, tasks.Task) and task.difficulties[0] == 0
    problem = task.make(random.Random(3), 1)
    assert problem == task.make(random.Random(3), 1)
    assert problem.trace == "" and problem.family == "gym/leg_counting"
    assert task.verify(problem, f"some thought</think>\n{problem.answer}\n") == 1.0
    assert task.verify(problem, "a horse") < 0.1


def test_gym_task_has_both_splits() -> None:
    task = tasks.get("gym/basic_arithmetic")
    for split in ("train", "test"):
        assert tasks.split_of(task.make(random.Random(0), 0, split).prompt) == split


def test_gym_task_refuses_unknown_generators_and_levels() -> None:
    with pytest.raises(InputError, match="no generator 'chess_boxing'"):
        tasks.get("gym/chess_boxing")
    with pytest.raises(InputError, match="not 999"):
        tasks.get("gym/leg_counting").make(random.Random(0), 999)
