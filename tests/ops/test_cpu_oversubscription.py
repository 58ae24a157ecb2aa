"""The number of threads: halved after two calls in a row that mostly waited, restored with exponential
backoff.
"""

import pytest

from nanohybrid.ops.numba.oversubscription import MAX_BACKOFF, MIN_BACKOFF, OversubscriptionDetector


def calls_until(detector, num_threads, waited, wanted, limit=3 * MAX_BACKOFF):
    """The number of calls, each of which reports waited(size), until the detector allows `wanted` threads."""
    for count in range(limit):
        size = detector.limit(num_threads)
        if size == wanted:
            return count
        detector.record(size, waited(size))
    raise AssertionError(f"the detector never allowed {wanted} threads")


def test_detector_allows_all_threads_on_a_quiet_machine():
    detector = OversubscriptionDetector()
    for call in range(1000):
        detector.record(8, 0.9 if call % 2 else 0.1)  # one late call in between is not oversubscription
        assert detector.limit(8) == 8


def test_detector_halves_the_threads_while_they_wait_down_to_one():
    detector = OversubscriptionDetector()
    halvings = [
        calls_until(detector, 8, lambda size: 0.7 if size > 1 else 0.0, wanted) for wanted in (4, 2, 1)
    ]
    assert halvings == [2, 2, 2]
    assert detector.limit(1) == 1


def test_detector_retries_all_threads_with_growing_backoff():
    detector, backoffs = OversubscriptionDetector(), []
    for _ in range(10):
        calls_until(detector, 2, lambda size: 0.7, 1)
        backoffs.append(calls_until(detector, 2, lambda size: 0.0, 2))
    assert backoffs[0] == MIN_BACKOFF and backoffs == sorted(backoffs)
    assert backoffs[-1] == backoffs[-2] == MAX_BACKOFF


def test_detector_resets_its_backoff_on_a_machine_that_became_quiet():
    detector = OversubscriptionDetector()
    for _ in range(6):
        calls_until(detector, 2, lambda size: 0.7, 1)
        calls_until(detector, 2, lambda size: 0.0, 2)
    for _ in range(MIN_BACKOFF):
        detector.record(2, 0.0)
    calls_until(detector, 2, lambda size: 0.7, 1)
    assert calls_until(detector, 2, lambda size: 0.0, 2) == MIN_BACKOFF


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_detector_ignores_the_waiting_time_of_a_single_thread(num_threads):
    detector = OversubscriptionDetector()
    for _ in range(100):
        detector.record(1, 1.0)
    assert detector.limit(num_threads) == num_threads
