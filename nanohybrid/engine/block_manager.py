"""Which request owns which state slot and which KV pages.

Plain Python: a pool manages numbers, the tensors are elsewhere.

A pool hands out an `Allocation`: numbers, and the generation in which they were assigned. No generation is
assigned twice, so an allocation that was freed, or whose numbers have a new owner, is recognized and refused.
"""

import heapq
from bisect import bisect_left
from typing import NamedTuple


class Allocation(NamedTuple):
    """Numbers of a pool that have one owner."""

    ids: tuple[int, ...]
    generation: int

    @property
    def contiguous(self) -> bool:
        """Whether the numbers are consecutive: their part of the pool can then be viewed without a copy."""
        return not self.ids or self.ids == tuple(range(self.ids[0], self.ids[0] + len(self.ids)))


class _Pool:
    """The owner of each of `size` numbers, as the generation of its allocation; 0 means free."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_free = size
        self._owner = [0] * size
        self._generation = 0

    @property
    def num_used(self) -> int:
        return self.size - self.num_free

    def owns(self, allocation: Allocation) -> bool:
        """Whether all numbers of this allocation still belong to it."""
        generation = allocation.generation
        return generation > 0 and all(self._owner[index] == generation for index in allocation.ids)

    def _check_owned(self, allocation: Allocation) -> None:
        if not self.owns(allocation):
            raise RuntimeError(
                f"{type(self).__name__}: "
                f"allocation {allocation.generation} of {allocation.ids} was freed already"
            )

    def _assign(self, ids: tuple[int, ...]) -> Allocation:
        self._generation += 1
        for index in ids:
            self._owner[index] = self._generation
        self.num_free -= len(ids)
        return Allocation(ids, self._generation)

    def _release(self, allocation: Allocation) -> None:
        self._check_owned(allocation)
        for index in allocation.ids:
            self._owner[index] = 0
        self.num_free += len(allocation.ids)


class SlotPool(_Pool):
    """Slots of recurrent state, one for each running request.

    The lowest free slot is allocated first, so that the slots in use stay dense.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._heap = list(range(size))

    def allocate(self) -> Allocation | None:
        """The lowest free slot; None where no slot is free."""
        return self._assign((heapq.heappop(self._heap),)) if self.num_free else None

    def free(self, allocation: Allocation) -> None:
        """Free a slot. Raises RuntimeError where it is free already."""
        self._release(allocation)
        heapq.heappush(self._heap, allocation.ids[0])


class PagePool(_Pool):
    """Pages of keys and values. Free pages are stored as runs of consecutive numbers.

    A request gets the pages it prefers; else the shortest run that holds all it needs; else several runs.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._runs: list[tuple[int, int]] = [(0, size)] if size else []  # (first, end), sorted, disjoint

    def allocate(self, count: int, prefer: int | None = None) -> Allocation | None:
        """`count` pages; None where fewer are free.

        They begin at page `prefer` where those are free; else they are contiguous where any free run is long
        enough.
        """
        if count > self.num_free:
            return None
        if count == 0:
            return self._assign(())
        if prefer is not None and (around := self._free_run_with(prefer, count)) is not None:
            return self._assign(self._carve(around, prefer, count))
        fitting = [run for run in self._runs if run[1] - run[0] >= count]
        if fitting:
            shortest = min(fitting, key=lambda run: run[1] - run[0])
            return self._assign(self._carve(shortest, shortest[0], count))
        ids: tuple[int, ...] = ()
        for run in sorted(self._runs, key=lambda run: run[0] - run[1]):  # the longest first: fewest runs
            ids += self._carve(run, run[0], min(count - len(ids), run[1] - run[0]))
            if len(ids) == count:
                break
        return self._assign(ids)

    def extend(self, allocation: Allocation, count: int) -> Allocation | None:
        """The same pages and `count` more, those after the last page where they are free.

        None where fewer are free. The old allocation is no longer valid. Raises RuntimeError where it was
        freed.
        """
        self._check_owned(allocation)
        more = self.allocate(count, prefer=allocation.ids[-1] + 1 if allocation.ids else None)
        if more is None:
            return None
        self.num_free += len(allocation.ids) + count  # `_assign` counts all of them once more
        return self._assign(allocation.ids + more.ids)

    def free(self, allocation: Allocation) -> None:
        """Free pages. Raises RuntimeError where they are free already."""
        self._release(allocation)
        ids = sorted(allocation.ids)
        begin = 0
        for index in range(1, len(ids) + 1):
            if index == len(ids) or ids[index] != ids[index - 1] + 1:
                self._merge(ids[begin], ids[index - 1] + 1)
                begin = index

    def _free_run_with(self, first: int, count: int) -> tuple[int, int] | None:
        """The free run that contains the `count` pages from `first` on."""
        index = bisect_left(self._runs, (first + 1, 0)) - 1
        run = self._runs[index] if index >= 0 else (0, 0)
        return run if run[0] <= first and first + count <= run[1] else None

    def _carve(self, run: tuple[int, int], first: int, count: int) -> tuple[int, ...]:
        """Remove `count` pages from a free run; returns them."""
        index = bisect_left(self._runs, run)
        rest = [(run[0], first), (first + count, run[1])]
        self._runs[index : index + 1] = [(begin, end) for begin, end in rest if begin < end]
        return tuple(range(first, first + count))

    def _merge(self, first: int, end: int) -> None:
        """Add a free run, merged with the runs next to it."""
        low = high = bisect_left(self._runs, (first, end))
        if low and self._runs[low - 1][1] == first:
            low -= 1
            first = self._runs[low][0]
        if high < len(self._runs) and self._runs[high][0] == end:
            end = self._runs[high][1]
            high += 1
        self._runs[low:high] = [(first, end)]
