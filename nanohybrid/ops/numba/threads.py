"""A thread pool for kernels: every thread runs the same kernel, with barriers and work queues.

A kernel is called as `kernel(rank, size, control, call)` on every thread. Between two barriers each thread
works on its own part. numba's and OpenMP's thread pools are not used: two pools that spin against each other
cost a quarter of the bandwidth.

Workers wait for the next launch in machine code, without the interpreter, so a kernel starts on them within a
microsecond as long as they spin. By default they sleep as soon as a kernel ends. With `keep_spinning` they
spin for some milliseconds first: two decode steps are less than a millisecond of Python apart, and waking a
sleeping thread takes longer than that is worth.
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

from nanohybrid.ops.numba.jit import inline, kernel
from nanohybrid.ops.numba.llvm import (
    atomic_add,
    atomic_exchange,
    clock_ns,
    invoke,
    load_acquire,
    pause,
    sched_yield,
    store_release,
)
from nanohybrid.ops.numba.memory import as_i64, i64_at
from nanohybrid.ops.numba.oversubscription import OversubscriptionDetector

# Bytes that a kernel must read to be worth another thread. Less is read faster than two threads pass the
# barriers of a small model's layers.
BYTES_PER_THREAD = 1 << 20
# Spins at a barrier before sched_yield, about 2 ms. A thread that yields early on a busy machine loses its
# time slice again and again, and a step with hundreds of barriers took up to five times as long
# (docs/log.md).
SPINS_BEFORE_YIELD = 2_000_000
SPINS_BEFORE_TIMING = 10_000  # some microseconds; a longer wait is timed and reported
SPINS_BEFORE_SLEEP = 100_000  # of a worker that waits for the next launch, some milliseconds
SPINS_PER_YIELD = 64  # of such a worker, between two calls of sched_yield

# The control block, int64 words that all threads see; each of the first words has a cache line of its own.
# Behind them lie a line for each thread, then the counters of `begin_stealing`.
LINE = 8  # words of a cache line
(ARRIVALS, GENERATION, QUEUE_HEAD, LAUNCHES, JOB, FINISHED, WAIT_NS, THREAD_LINES) = range(0, 8 * LINE, LINE)
KERNEL_ADDRESS, CALL_ADDRESS, SPIN_LIMIT, SLEEPING_MASK = range(JOB, JOB + 4)
# Words of a thread's line: whether it sleeps, the last launch that it ran, how many stealing rounds it has
# begun.
IS_ASLEEP, LAST_LAUNCH, STEALING_ROUNDS = 0, 1, 2
# Stealing rounds whose counters are separate. A kernel has a barrier at least once in every fourth round.
ROUND_BUFFERS = 8


@inline
def barrier_wait(control: int, size: int) -> None:
    """Wait until all `size` threads are here."""
    if size == 1:
        return
    generation = load_acquire(i64_at(control, GENERATION))
    if atomic_add(control, 1) == size - 1:
        store_release(control, 0)
        store_release(i64_at(control, GENERATION), generation + 1)
        return
    spin_until(i64_at(control, GENERATION), generation + 1, control)


@inline
def spin_until(address: int, value: int, control: int) -> None:
    """Spin until the word at `address` is `value`; yield the processor after many spins.

    Long waits are added to WAIT_NS.
    """
    spins = since = 0
    while load_acquire(address) != value:
        spins += 1
        if spins == SPINS_BEFORE_TIMING:
            since = clock_ns()
        if spins > SPINS_BEFORE_YIELD:
            sched_yield()
    if since:
        atomic_add(i64_at(control, WAIT_NS), clock_ns() - since)


@inline
def partition(count: int, rank: int, size: int) -> tuple[int, int]:
    """This thread's static partition of `count` items: first, last + 1."""
    return count * rank // size, count * (rank + 1) // size


@inline
def rank_of(offset: int, count: int, size: int) -> int:
    """The thread of a piece of work that begins at `offset` of `count` items and may span several."""
    return offset * size // count


@inline
def begin_stealing(control: int, rank: int, size: int) -> int:
    """Begin a round of work stealing: the address of its counters, a line for each thread.

    Every thread must begin the same rounds in the same order.
    """
    own = as_i64(i64_at(control, THREAD_LINES + rank * LINE))
    now = own[STEALING_ROUNDS]
    own[STEALING_ROUNDS] = now + 1
    counters = i64_at(control, THREAD_LINES + size * LINE)
    # Clear this thread's counter of a round that every thread has left and none has begun.
    as_i64(i64_at(counters, ((now + ROUND_BUFFERS // 2) % ROUND_BUFFERS * size + rank) * LINE))[0] = 0
    return i64_at(counters, now % ROUND_BUFFERS * size * LINE)


@inline
def next_or_steal(counters: int, count: int, rank: int, size: int) -> int:
    """The next of `count` items for this thread, or -1 where none is left.

    A thread takes the items of its own partition from the front, then steals from the back of the others'. A
    thread that is slow or descheduled therefore delays the others little, and one that is not reads memory in
    order.
    """
    first, last = partition(count, rank, size)
    # High half: items taken from the front. Low half: items stolen from the back.
    taken = atomic_add(i64_at(counters, rank * LINE), 1 << 32)
    if num_taken(taken) < last - first:
        return first + (taken >> 32)
    for step in range(1, size):
        other = (rank + step) % size
        first, last = partition(count, other, size)
        if num_taken(load_acquire(i64_at(counters, other * LINE))) < last - first:
            taken = atomic_add(i64_at(counters, other * LINE), 1)
            if num_taken(taken) < last - first:
                return last - 1 - (taken & 0xFFFFFFFF)
    return -1


@inline
def num_taken(counter: int) -> int:
    """How many items of a partition are taken, from either end."""
    return (counter >> 32) + (counter & 0xFFFFFFFF)


@inline
def reset_queue(control: int) -> None:
    """Restart the work queue at item 0.

    One thread calls it, before a barrier that precedes the first `pop_queue`.
    """
    store_release(i64_at(control, QUEUE_HEAD), 0)


@inline
def pop_queue(control: int) -> int:
    """The next item of the shared work queue, for items that take unequally long."""
    return atomic_add(i64_at(control, QUEUE_HEAD), 1)


@kernel
def launch(rank, size, control, call):
    """Publish the job in the control block.

    Leaves a bit for each sleeping worker in SLEEPING_MASK; where none sleeps, rank 0 runs its part and waits
    for the others.
    """
    atomic_add(i64_at(control, LAUNCHES), 1)
    asleep = 0
    for other in range(1, size):
        flag = i64_at(control, THREAD_LINES + other * LINE + IS_ASLEEP)
        asleep |= atomic_exchange(flag, 0) << other
    as_i64(control)[SLEEPING_MASK] = asleep
    if not asleep:
        run_rank_0(size, control)


@kernel
def finish_launch(rank, size, control, call):
    """The rest of `launch`, after Python has woken the sleeping workers."""
    run_rank_0(size, control)


@inline
def run_rank_0(size: int, control: int) -> None:
    """Run rank 0's part of the job, and wait until the workers have finished theirs."""
    job = as_i64(control)
    invoke(job[KERNEL_ADDRESS], 0, size, control, job[CALL_ADDRESS])
    spin_until(i64_at(control, FINISHED), size - 1, control)
    store_release(i64_at(control, FINISHED), 0)


@kernel
def worker_loop(rank, size, control, call):
    """Run each launched job. Returns, marked as asleep, when no launch came for SPIN_LIMIT spins."""
    job, own = as_i64(control), as_i64(i64_at(control, THREAD_LINES + rank * LINE))
    is_asleep = i64_at(control, THREAD_LINES + rank * LINE + IS_ASLEEP)
    seen, spins, limit = own[LAST_LAUNCH], 0, 0
    while True:
        if load_acquire(i64_at(control, LAUNCHES)) != seen:
            seen, spins, limit = seen + 1, 0, job[SPIN_LIMIT]
            invoke(job[KERNEL_ADDRESS], rank, size, control, job[CALL_ADDRESS])
            atomic_add(i64_at(control, FINISHED), 1)
        elif spins < limit:
            spins += 1
            pause()
            if spins % SPINS_PER_YIELD == 0:
                sched_yield()
        else:
            atomic_exchange(is_asleep, 1)
            # Sleep if no launch came meanwhile, or if a launcher has seen the flag and will wake this thread.
            if atomic_add(i64_at(control, LAUNCHES), 0) == seen or atomic_exchange(is_asleep, 0) == 0:
                own[LAST_LAUNCH] = seen
                return


class ThreadPool:
    """`size` threads, of which the caller's is rank 0.

    It runs one kernel at a time; callers wait for each other.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        words = THREAD_LINES + (1 + ROUND_BUFFERS) * size * LINE
        self._control = torch.zeros(words, dtype=torch.int64).numpy()
        self._address = self._control.ctypes.data
        self._lock = threading.Lock()
        self._wake: list[SimpleQueue[bool]] = [SimpleQueue() for _ in range(size)]
        self._threads = []
        for rank in range(1, size):
            self._control[THREAD_LINES + rank * LINE + IS_ASLEEP] = 1
            self._threads.append(
                threading.Thread(target=self._work, args=(rank,), daemon=True, name=f"nanohybrid-{rank}")
            )
            self._threads[-1].start()

    def run(self, kernel: kernel, call: int, keep_spinning: bool = False) -> float:
        """Run a kernel on all threads, and return when all have finished.

        call: the address of its arguments. keep_spinning: whether the next kernel follows within
        milliseconds, so workers wait for it awake. Returns the share of the time that the threads spent
        waiting for each other, the mean of all but one thread.
        """
        address, control = self._address, self._control
        if self.size == 1:
            kernel.from_python(0, 1, address, call)
            return 0.0
        with self._lock:
            began = time.perf_counter_ns()
            control[KERNEL_ADDRESS], control[CALL_ADDRESS] = kernel.address, call
            control[SPIN_LIMIT], control[WAIT_NS] = SPINS_BEFORE_SLEEP if keep_spinning else 0, 0
            launch.from_python(0, self.size, address, 0)
            asleep = int(control[SLEEPING_MASK])
            if asleep:
                for rank in range(1, self.size):
                    if asleep >> rank & 1:
                        self._wake[rank].put(True)
                finish_launch.from_python(0, self.size, address, 0)
            return float(control[WAIT_NS] / (time.perf_counter_ns() - began) / (self.size - 1))

    def close(self) -> None:
        """End the threads: machine code must not run while the interpreter is torn down."""
        for wake in self._wake:
            wake.put(False)
        for thread in self._threads:
            thread.join(timeout=1)

    def _work(self, rank: int) -> None:
        while self._wake[rank].get():
            worker_loop.from_python(rank, self.size, self._address, 0)


_pools: dict[tuple[int, int], ThreadPool] = {}  # by process and size: a forked child has pools of its own
_oversubscription = OversubscriptionDetector()


def run(kernel: kernel, *arguments: int | float | np.ndarray, size: int, keep_spinning: bool = False) -> None:
    """Run a kernel on `size` threads (see `num_threads`), as ThreadPool.run.

    Its call has one word per argument: an integer as it is, the bits of a float64, the address of an array.
    """
    key = (os.getpid(), size)
    if key not in _pools:
        _pools[key] = ThreadPool(size)
    call = array("q", map(_as_word, arguments))
    waited = _pools[key].run(kernel, call.buffer_info()[0], keep_spinning)
    _oversubscription.record(size, waited)


def num_threads(bytes_read: int) -> int:
    """How many threads to run a kernel on that reads so many bytes.

    At most torch's number of threads, one for each BYTES_PER_THREAD, and fewer on an oversubscribed machine.
    """
    return max(1, min(_oversubscription.limit(torch.get_num_threads()), bytes_read // BYTES_PER_THREAD))


def _as_word(argument: int | float | np.ndarray) -> int:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, float):
        return int(struct.unpack("q", struct.pack("d", argument))[0])
    return int(argument.ctypes.data)


@atexit.register
def _close_pools() -> None:
    for (process, _), pool in _pools.items():
        if process == os.getpid():
            pool.close()
