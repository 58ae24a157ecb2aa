"""How many threads are worth it on a machine that others use too.

Threads that meet at barriers all stand still while one of them is not running: beside one busy process two threads took three
times as long as alone, and longer than one thread takes. So each call tells how much of it was spent waiting. Where that was most of two
calls in a row, the next ones run on half of the threads; then all are tried again, less and less often while it stays crowded.
The number of threads changes no result.
"""

from __future__ import annotations

CROWDED = 0.4  # of a call, spent waiting for others
TWICE = 2  # calls in a row
SHORTEST, LONGEST = 32, 2048  # calls on fewer threads before all are tried again


class Crowd:
    """What calls have told. `halvings`: how often the number of threads is halved now."""

    def __init__(self) -> None:
        self.halvings = 0
        self._crowded = self._free = 0  # calls of either kind in a row
        self._left, self._pause = 0, SHORTEST

    def threads(self, most: int) -> int:
        """Of at most so many."""
        return max(1, most >> self.halvings)

    def tell(self, size: int, waited: float) -> None:
        """A call on `size` threads spent this share of its time waiting."""
        if self._left:
            self._left -= 1
            if not self._left:
                self.halvings = 0
        if size == 1:
            return
        if waited > CROWDED:
            self._crowded, self._free = self._crowded + 1, 0
            if self._crowded == TWICE:
                self.halvings, self._crowded = self.halvings + 1, 0
                self._left, self._pause = self._pause, min(LONGEST, 2 * self._pause)
        else:
            self._crowded, self._free = 0, self._free + 1
            if self._free == SHORTEST and not self.halvings:
                self._pause = SHORTEST
