"""Where a kernel's time goes: each thread adds the ticks since its last lap to the phase that ends with it.

A kernel that is given no clock (0) does nothing here but look at that, a few hundred times a step.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import ticks, words

PHASES = (
    "embedding", "wake", "norms", "Mamba-2 in", "conv and recurrence", "Mamba-2 out", "queries, keys, values", "attention", "attention out",
    "MLP up", "MLP down", "final norm", "head", "waiting",
)  # fmt: skip
(
    EMBEDDING,
    WAKE,
    NORMS,
    MAMBA_IN,
    RECURRENCE,
    MAMBA_OUT,
    QKV,
    ATTENTION,
    ATTENTION_OUT,
    UP,
    DOWN,
    FINAL,
    HEAD,
    WAITING,
) = range(len(PHASES))
WORDS = 32  # of a thread's clock: the last lap, then a sum for each phase; whole cache lines


@inlined
def start(clock, rank):
    """This thread's clock, set going; 0 where there is none."""
    if not clock:
        return 0
    mine = clock + rank * WORDS * 8
    words(mine)[0] = ticks()
    return mine


@inlined
def lap(mine, phase):
    """What passed since the last lap was `phase`."""
    if mine:
        sums, now = words(mine), ticks()
        sums[1 + phase] += now - sums[0]
        sums[0] = now


@kernel
def read(rank, size, barrier, call):
    """The counter, to where it is wanted."""
    words(words(call)[0])[0] = ticks()


def make(threads: int) -> np.ndarray:
    """A clock for so many threads."""
    return np.zeros((threads, WORDS), dtype=np.int64)
