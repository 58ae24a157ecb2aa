"""A few threads that run one kernel together, each told its rank, with a barrier of their own inside.

A kernel is called as `kernel(rank, size, barrier, *arguments)` on every thread; between two barriers each works on its own
part. Waking the team costs tens of microseconds, so a kernel should be a whole step, or a whole matrix. No thread pool of
numba's or OpenMP's takes part: two pools that spin against each other cost a quarter of the bandwidth.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import torch

from nanohybrid.ops.cpu.compiled import inlined
from nanohybrid.ops.cpu.llvm import add_atomically, give_way, load_acquire, store_release

WORTH_A_THREAD = 1 << 20  # bytes: less is read sooner than two threads have met at each of a small model's layers
SPINS = 2_000_000  # looks at the barrier before the processor is offered to others, about 2 ms: who yields early on a busy machine
# loses its turn again and again, and a step with hundreds of meetings took up to five times as long (docs/log.md)


@inlined
def meet(barrier: int, size: int) -> None:
    """Wait until all `size` threads are here. `barrier` is the address of the count of arrivals; the round stands a cache line behind."""
    if size == 1:
        return
    now = load_acquire(barrier + 64)
    if add_atomically(barrier, 1) == size - 1:
        store_release(barrier, 0)
        store_release(barrier + 64, now + 1)
        return
    looks = 0
    while load_acquire(barrier + 64) == now:
        looks += 1
        if looks > SPINS:
            give_way()


@inlined
def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """This thread's part of `count` items: from, to."""
    return count * rank // size, count * (rank + 1) // size


@inlined
def deal_anew(barrier: int) -> None:
    """Begin to deal items out from 0. For one thread, while none takes any: before a meeting that comes before them."""
    store_release(barrier + 128, 0)


@inlined
def take(barrier: int) -> int:
    """The next item that no thread has taken, for work whose parts take unequally long."""
    return add_atomically(barrier + 128, 1)


class Team:
    """`size` threads, the caller's among them. One kernel at a time: callers wait for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = np.zeros(32, dtype=np.int64)
        self._lock = threading.Lock()
        self._jobs: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(size - 1)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        for rank, jobs in enumerate(self._jobs, start=1):
            threading.Thread(target=self._work, args=(rank, jobs), daemon=True, name=f"nanohybrid-{rank}").start()

    def run(self, kernel: Any, *arguments: Any) -> None:
        """Run it on all threads and return when all are through."""
        with self._lock:
            barrier = self._barrier.ctypes.data
            _compile(kernel, (0, self.size, barrier, *arguments))
            for jobs in self._jobs:
                jobs.put((kernel, barrier, arguments))
            kernel(0, self.size, barrier, *arguments)
            for _ in self._jobs:
                error = self._done.get()
                if error is not None:
                    raise error

    def _work(self, rank: int, jobs: SimpleQueue[Any]) -> None:
        while True:
            kernel, barrier, arguments = jobs.get()
            try:
                kernel(rank, self.size, barrier, *arguments)
                self._done.put(None)
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who waits for it
                self._done.put(error)


def _compile(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Have it compiled, or read from disk, before any thread waits at its barriers. A kernel has one signature."""
    if not kernel.overloads:
        kernel.compile(tuple(numba.typeof(argument) for argument in arguments))


_teams: dict[tuple[int, int], Team] = {}


def run(kernel: Any, *arguments: Any, bytes_read: int) -> None:
    """Run a kernel on as many threads as torch has, or as pay for their meetings: `bytes_read` is what it streams.

    Each process (a forked child too) has its own team.
    """
    key = (os.getpid(), threads(bytes_read))
    if key not in _teams:
        _teams[key] = Team(key[1])
    _teams[key].run(kernel, *arguments)


def threads(bytes_read: int) -> int:
    """How many threads a kernel that streams so many bytes is worth."""
    return max(1, min(torch.get_num_threads(), bytes_read // WORTH_A_THREAD))
