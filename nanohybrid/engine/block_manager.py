"""Who owns which state slot and which KV pages. Plain Python: a pool hands out numbers, the tensors lie elsewhere.

Everything is handed out as a `Lease`: the numbers and the generation they were given in. A generation is never given
twice, so a lease that was returned, or whose numbers have a new owner since, is recognized and refused.
"""

import heapq
from bisect import bisect_left
from typing import NamedTuple


class Lease(NamedTuple):
    """Numbers of a pool held by one owner."""

    ids: tuple[int, ...]
    generation: int

    @property
    def contiguous(self) -> bool:
        """Whether the numbers are one run, so that their part of the pool can be viewed without a copy."""
        return not self.ids or self.ids == tuple(range(self.ids[0], self.ids[0] + len(self.ids)))


class _Pool:
    """Ownership: which generation holds each number; 0 is nobody."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._owner = [0] * size
        self._generation = 0

    @property
    def used(self) -> int:
        return self.size - self.free

    def owns(self, lease: Lease) -> bool:
        """Whether all numbers of this lease still belong to it."""
        return lease.generation > 0 and all(self._owner[index] == lease.generation for index in lease.ids)

    def _take(self, ids: tuple[int, ...]) -> Lease:
        self._generation += 1
        for index in ids:
            self._owner[index] = self._generation
        self.free -= len(ids)
        return Lease(ids, self._generation)

    def _give(self, lease: Lease) -> None:
        if not self.owns(lease):
            raise RuntimeError(
                f"{type(self).__name__}: lease {lease.generation} of {lease.ids} was returned already"
            )
        for index in lease.ids:
            self._owner[index] = 0
        self.free += len(lease.ids)


class SlotPool(_Pool):
    """Slots of recurrent state, one a running request; the lowest free one first, so that the used part stays dense."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._heap = list(range(size))

    def take(self) -> Lease | None:
        """The lowest free slot, or None."""
        return self._take((heapq.heappop(self._heap),)) if self.free else None

    def give(self, lease: Lease) -> None:
        """Return a slot. Raises RuntimeError where it was returned before."""
        self._give(lease)
        heapq.heappush(self._heap, lease.ids[0])


class PagePool(_Pool):
    """Pages of attention KV. Free pages are kept as runs: a request gets the place it prefers, else the tightest run that
    holds it, else several."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._runs: list[tuple[int, int]] = (
            [(0, size)] if size else []
        )  # (first, end), sorted, never touching

    def take(self, count: int, prefer: int | None = None) -> Lease | None:
        """`count` pages, from `prefer` on where those are free, else contiguous where any free run is long enough.

        None where fewer are free.
        """
        if count > self.free:
            return None
        if count == 0:
            return self._take(())
        if prefer is not None and (around := self._run_around(prefer, count)) is not None:
            return self._take(self._cut(around, prefer, count))
        fitting = [run for run in self._runs if run[1] - run[0] >= count]
        if fitting:
            tightest = min(fitting, key=lambda run: run[1] - run[0])
            return self._take(self._cut(tightest, tightest[0], count))
        ids: tuple[int, ...] = ()
        for run in sorted(self._runs, key=lambda run: run[0] - run[1]):  # longest first: fewest pieces
            ids += self._cut(run, run[0], min(count - len(ids), run[1] - run[0]))
            if len(ids) == count:
                break
        return self._take(ids)

    def extend(self, lease: Lease, count: int) -> Lease | None:
        """The same pages and `count` more, those behind the last where they are free; None where fewer are free.

        The old lease is refused from then on.
        """
        if not self.owns(lease):
            raise RuntimeError(
                f"{type(self).__name__}: lease {lease.generation} of {lease.ids} was returned already"
            )
        more = self.take(count, prefer=lease.ids[-1] + 1 if lease.ids else None)
        if more is None:
            return None
        self.free += len(lease.ids) + count  # taken once more, as one
        return self._take(lease.ids + more.ids)

    def give(self, lease: Lease) -> None:
        """Return pages. Raises RuntimeError where they were returned before."""
        self._give(lease)
        ids = sorted(lease.ids)
        begin = 0
        for index in range(1, len(ids) + 1):
            if index == len(ids) or ids[index] != ids[index - 1] + 1:
                self._join(ids[begin], ids[index - 1] + 1)
                begin = index

    def _run_around(self, first: int, count: int) -> tuple[int, int] | None:
        """The free run that holds all of these pages."""
        index = bisect_left(self._runs, (first + 1, 0)) - 1
        run = self._runs[index] if index >= 0 else (0, 0)
        return run if run[0] <= first and first + count <= run[1] else None

    def _cut(self, run: tuple[int, int], first: int, count: int) -> tuple[int, ...]:
        index = bisect_left(self._runs, run)
        rest = [(run[0], first), (first + count, run[1])]
        self._runs[index : index + 1] = [(begin, end) for begin, end in rest if begin < end]
        return tuple(range(first, first + count))

    def _join(self, first: int, end: int) -> None:
        """Put the run back, merged with the runs it touches."""
        low = high = bisect_left(self._runs, (first, end))
        if low and self._runs[low - 1][1] == first:
            low -= 1
            first = self._runs[low][0]
        if high < len(self._runs) and self._runs[high][0] == end:
            end = self._runs[high][1]
            high += 1
        self._runs[low:high] = [(first, end)]
