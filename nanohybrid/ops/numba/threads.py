"""A few threads that run one kernel together, each told its rank, with a barrier of their own inside.

A kernel is called as `kernel(rank, size, barrier, call)` on every thread; between two barriers each works on its own part. No
thread pool of numba's or OpenMP's takes part: two pools that spin against each other cost a quarter of the bandwidth.

Threads wait for work in machine code, which needs no interpreter: a kernel that is to run begins on them within a microsecond, as
long as they have not gone to sleep. They do so at once, unless more work was announced (`soon`): between two steps of decoding
there is less than a millisecond of Python, and to wake a thread that sleeps takes longer than that is worth.
"""

from __future__ import annotations

import atexit
import os
import struct
import threading
import time
from array import array
from queue import SimpleQueue

import numpy as np
import torch

from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import (
    add_atomically,
    exchange,
    give_way,
    invoke,
    load_acquire,
    nanoseconds,
    pause,
    store_release,
    words,
)
from nanohybrid.ops.numba.oversubscription import Crowd

WORTH_A_THREAD = (
    1 << 20
)  # bytes: less is read sooner than two threads have met at each of a small model's layers
SPINS = 2_000_000  # looks at the barrier before the processor is offered to others, about 2 ms: who yields early on a busy machine
# loses its turn again and again, and a step with hundreds of meetings took up to five times as long (docs/log.md)
LATE = 10_000  # looks, some microseconds: what waits longer is told
SOON = 100_000  # looks for more work, some milliseconds; between every POLITE of them others may have the processor
POLITE = 64

# The board, words that all threads see. The barrier comes first: arrivals, its round, what was dealt, each in a cache line of its own.
ARRIVALS, ROUND, DEALT, TURN, JOB, DONE, WAITED, THREADS, LINE = 0, 8, 16, 24, 32, 40, 48, 56, 8
CODE, CALL, PATIENCE, ASLEEP_NOW = range(JOB, JOB + 4)
ASLEEP, SEEN, ROUNDS = (
    0,
    1,
    2,
)  # of a thread's line: whether it sleeps, the last turn that it knows, and rounds of shares that it was in
HANDS = 8  # rounds of shares whose counts are kept apart, behind the threads' lines; a kernel meets more often than every fourth


@inlined
def meet(barrier: int, size: int) -> None:
    """Wait until all `size` threads are here. `barrier` is the address of the count of arrivals; the round stands a cache line behind."""
    if size == 1:
        return
    now = load_acquire(barrier + ROUND * 8)
    if add_atomically(barrier, 1) == size - 1:
        store_release(barrier, 0)
        store_release(barrier + ROUND * 8, now + 1)
        return
    wait_for(barrier + ROUND * 8, now + 1, barrier)


@inlined
def wait_for(address: int, value: int, board: int) -> None:
    """Look until this word is `value`; after many looks give way to others. Waiting that is worth telling is told on the board."""
    looks = since = 0
    while load_acquire(address) != value:
        looks += 1
        if looks == LATE:
            since = nanoseconds()
        if looks > SPINS:
            give_way()
    if since:
        add_atomically(board + WAITED * 8, nanoseconds() - since)


@inlined
def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """This thread's part of `count` items: from, to."""
    return count * rank // size, count * (rank + 1) // size


@inlined
def new_round(barrier: int, rank: int, size: int) -> int:
    """Where the counts of a round of shares stand, one for each thread. All threads must begin the same rounds."""
    mine = words(barrier + (THREADS + rank * LINE) * 8)
    now = mine[ROUNDS]
    mine[ROUNDS] = now + 1
    hands = barrier + (THREADS + size * LINE) * 8
    words(hands + ((now + HANDS // 2) % HANDS * size + rank) * LINE * 8)[0] = (
        0  # of a round that all have left, and none begun
    )
    return hands + now % HANDS * size * LINE * 8


@inlined
def next_of(hand: int, count: int, rank: int, size: int) -> int:
    """The next of `count` items for this thread: of its share from the front on, then of the others' from behind; -1: none is left.

    So who is slower, or is not running, keeps little that others wait for; and whoever is not reads one run of memory.
    """
    first, last = share(count, rank, size)
    taken = add_atomically(
        hand + rank * LINE * 8, 1 << 32
    )  # from the front in the high half, from behind in the low one
    if gone(taken) < last - first:
        return first + (taken >> 32)
    for step in range(1, size):
        other = (rank + step) % size
        first, last = share(count, other, size)
        if gone(load_acquire(hand + other * LINE * 8)) < last - first:
            taken = add_atomically(hand + other * LINE * 8, 1)
            if gone(taken) < last - first:
                return last - 1 - (taken & 0xFFFFFFFF)
    return -1


@inlined
def gone(taken: int) -> int:
    """How many items of a share somebody has taken, from either end."""
    return (taken >> 32) + (taken & 0xFFFFFFFF)


@inlined
def deal_anew(barrier: int) -> None:
    """Begin to deal items out from 0. For one thread, while none takes any: before a meeting that comes before them."""
    store_release(barrier + DEALT * 8, 0)


@inlined
def take(barrier: int) -> int:
    """The next item that no thread has taken, for work whose parts take unequally long."""
    return add_atomically(barrier + DEALT * 8, 1)


@kernel
def announce(rank, size, board, call):
    """A new turn: the job on the board is for all. Leaves there how many sleep and must be woken."""
    add_atomically(board + TURN * 8, 1)
    asleep = 0
    for other in range(1, size):
        asleep |= exchange(board + (THREADS + other * LINE + ASLEEP) * 8, 0) << other
    words(board)[ASLEEP_NOW] = asleep
    if not asleep:
        lead(size, board)


@kernel
def go_on(rank, size, board, call):
    """The rest of `announce`, once all are awake."""
    lead(size, board)


@inlined
def lead(size: int, board: int) -> None:
    """Rank 0's part, and wait for the others'."""
    job = words(board)
    invoke(job[CODE], 0, size, board, job[CALL])
    wait_for(board + DONE * 8, size - 1, board)
    store_release(board + DONE * 8, 0)


@kernel
def follow(rank, size, board, call):
    """Run what is announced, turn by turn, until there is nothing more for as long as was said; then return asleep, to be woken."""
    job, mine = words(board), words(board + (THREADS + rank * LINE) * 8)
    sleeper, seen, looks, patience = board + (THREADS + rank * LINE + ASLEEP) * 8, mine[SEEN], 0, 0
    while True:
        if load_acquire(board + TURN * 8) != seen:
            seen, looks, patience = seen + 1, 0, job[PATIENCE]
            invoke(job[CODE], rank, size, board, job[CALL])
            add_atomically(board + DONE * 8, 1)
        elif looks < patience:
            looks += 1
            pause()
            if looks % POLITE == 0:
                give_way()
        else:
            exchange(sleeper, 1)
            if add_atomically(board + TURN * 8, 0) == seen or exchange(sleeper, 0) == 0:
                mine[SEEN] = (
                    seen  # nothing came, or whoever announced it has seen this thread asleep and wakes it
                )
                return


class Team:
    """`size` threads, the caller's among them. One kernel at a time: callers wait for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._board = torch.zeros(THREADS + (1 + HANDS) * size * LINE, dtype=torch.int64).numpy()
        self._address = self._board.ctypes.data
        self._lock = threading.Lock()
        self._wake: list[SimpleQueue[bool]] = [SimpleQueue() for _ in range(size)]
        self._threads = []
        for rank in range(1, size):
            self._board[THREADS + rank * LINE + ASLEEP] = 1
            self._threads.append(
                threading.Thread(target=self._work, args=(rank,), daemon=True, name=f"nanohybrid-{rank}")
            )
            self._threads[-1].start()

    def run(self, kernel: kernel, call: int, soon: bool = False) -> float:
        """Run it on all threads and return when all are through: the share of the time in which all but one waited. `call`: the
        address of its arguments; `soon`: whether the next kernel follows within milliseconds, and threads shall wait awake for it."""
        address, board = self._address, self._board
        if self.size == 1:
            kernel.alone(0, 1, address, call)
            return 0.0
        with self._lock:
            began = time.perf_counter_ns()
            board[CODE], board[CALL], board[PATIENCE], board[WAITED] = (
                kernel.address,
                call,
                SOON if soon else 0,
                0,
            )
            announce.alone(0, self.size, address, 0)
            asleep = int(board[ASLEEP_NOW])
            if asleep:
                for rank in range(1, self.size):
                    if asleep >> rank & 1:
                        self._wake[rank].put(True)
                go_on.alone(0, self.size, address, 0)
            return float(board[WAITED] / (time.perf_counter_ns() - began) / (self.size - 1))

    def close(self) -> None:
        """End the threads: machine code must not run on while the interpreter is taken down."""
        for wake in self._wake:
            wake.put(False)
        for thread in self._threads:
            thread.join(timeout=1)

    def _work(self, rank: int) -> None:
        while self._wake[rank].get():
            follow.alone(rank, self.size, self._address, 0)


_teams: dict[tuple[int, int], Team] = {}
_crowd = Crowd()


def run(kernel: kernel, *arguments: int | float | np.ndarray, size: int, soon: bool = False) -> None:
    """Run a kernel on `size` threads, as `threads` counts them.

    Its call is a word for each argument: integers as they are, of a float64 the bits, of an array the address. Each process (a
    forked child too) has its own team.
    """
    key = (os.getpid(), size)
    if key not in _teams:
        _teams[key] = Team(size)
    call = array("q", map(_word, arguments))
    waited = _teams[key].run(kernel, call.buffer_info()[0], soon)
    _crowd.tell(size, waited)


def threads(bytes_read: int) -> int:
    """How many threads a kernel that streams so many bytes is worth: as many as torch has, or as pay for their meetings, or as get
    a processor each."""
    return max(1, min(_crowd.threads(torch.get_num_threads()), bytes_read // WORTH_A_THREAD))


def _word(argument: int | float | np.ndarray) -> int:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, float):
        return int(struct.unpack("q", struct.pack("d", argument))[0])
    return int(argument.ctypes.data)


@atexit.register
def _close() -> None:
    for (process, _), team in _teams.items():
        if process == os.getpid():
            team.close()
