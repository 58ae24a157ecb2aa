"""How many threads: fewer where waiting was most of two calls in a row, all again after a while, and after longer where that fails."""

import pytest

from nanohybrid.ops.numba.oversubscription import LONGEST, SHORTEST, Crowd


def calls_until(crowd, most, waited, wanted, limit=3 * LONGEST):
    """Calls, each telling waited(size), until `wanted` threads are allowed."""
    for count in range(limit):
        if crowd.threads(most) == wanted:
            return count
        crowd.tell(crowd.threads(most), waited(crowd.threads(most)))
    raise AssertionError(f"never {wanted} threads")


def test_a_quiet_machine_keeps_all_threads():
    crowd = Crowd()
    for call in range(1000):
        crowd.tell(8, 0.9 if call % 2 else 0.1)  # one late call is no crowd
        assert crowd.threads(8) == 8


def test_threads_are_halved_as_long_as_they_wait_and_never_gone():
    crowd = Crowd()
    assert [calls_until(crowd, 8, lambda size: 0.7 if size > 1 else 0.0, wanted) for wanted in (4, 2, 1)] == [
        2,
        2,
        2,
    ]
    assert crowd.threads(1) == 1


def test_all_are_tried_again_less_and_less_often():
    crowd, pauses = Crowd(), []
    for _ in range(10):
        calls_until(crowd, 2, lambda size: 0.7, 1)
        pauses.append(calls_until(crowd, 2, lambda size: 0.0, 2))
    assert pauses[0] == SHORTEST and pauses == sorted(pauses) and pauses[-1] == pauses[-2] == LONGEST


def test_a_machine_that_became_quiet_is_forgiven():
    crowd = Crowd()
    for _ in range(6):
        calls_until(crowd, 2, lambda size: 0.7, 1)
        calls_until(crowd, 2, lambda size: 0.0, 2)
    for _ in range(SHORTEST):
        crowd.tell(2, 0.0)
    calls_until(crowd, 2, lambda size: 0.7, 1)
    assert calls_until(crowd, 2, lambda size: 0.0, 2) == SHORTEST


@pytest.mark.parametrize("most", [1, 3, 16])
def test_one_thread_waits_for_nobody(most):
    crowd = Crowd()
    for _ in range(100):
        crowd.tell(1, 1.0)
    assert crowd.threads(most) == most
