"""Detects a machine whose processors are shared, and lowers the number of threads there.

Threads wait for each other at barriers, so all of them stand still while one is descheduled. Beside one busy
process, two threads took three times as long as on a quiet machine, and longer than one thread takes. Each
kernel call therefore reports the share of its time that was spent waiting. After two calls in a row that
waited for most of their time, the next calls run on half of the threads. Then all threads are tried again,
with exponential backoff while the machine stays busy. The number of threads does not change any result.
"""

from __future__ import annotations

WAIT_FRACTION = 0.4  # of a call's time; above it the call counts as oversubscribed
CALLS_IN_A_ROW = 2  # that must be oversubscribed before the number of threads is halved
MIN_BACKOFF, MAX_BACKOFF = 32, 2048  # calls on fewer threads before all are tried again


class OversubscriptionDetector:
    """Limits the number of threads from what calls report.

    `halvings`: how often the number is halved at present.
    """

    def __init__(self) -> None:
        self.halvings = 0
        self._busy = self._quiet = 0  # consecutive calls of either kind
        self._remaining, self._backoff = 0, MIN_BACKOFF

    def limit(self, num_threads: int) -> int:
        """The number of threads to use where `num_threads` are configured."""
        return max(1, num_threads >> self.halvings)

    def record(self, size: int, waited: float) -> None:
        """Report a call on `size` threads that spent the share `waited` of its time waiting."""
        if self._remaining:
            self._remaining -= 1
            if not self._remaining:
                self.halvings = 0
        if size == 1:
            return
        if waited > WAIT_FRACTION:
            self._busy, self._quiet = self._busy + 1, 0
            if self._busy == CALLS_IN_A_ROW:
                self.halvings, self._busy = self.halvings + 1, 0
                self._remaining, self._backoff = self._backoff, min(MAX_BACKOFF, 2 * self._backoff)
        else:
            self._busy, self._quiet = 0, self._quiet + 1
            if self._quiet == MIN_BACKOFF and not self.halvings:
                self._backoff = MIN_BACKOFF
