"""Time of a forward by phase: each thread adds the cycles since its last record to the phase that ends.

Without counters (the word `profile` of a call is 0) a kernel only compares that word with zero, a few hundred
times a step.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.numba.jit import inline, kernel
from nanohybrid.ops.numba.llvm import cycle_counter
from nanohybrid.ops.numba.memory import as_i64, i64_at

PHASES = (
    "embedding", "wake", "norms", "Mamba-2 in", "conv and recurrence", "Mamba-2 out",
    "queries, keys, values", "attention", "attention out", "MLP up", "MLP down", "final norm", "head",
    "waiting",
)  # fmt: skip
(
    EMBEDDING, WAKE, NORMS, MAMBA_IN, RECURRENCE, MAMBA_OUT, QKV, ATTENTION, ATTENTION_OUT, MLP_UP, MLP_DOWN,
    FINAL_NORM, HEAD, WAITING,
) = range(len(PHASES))  # fmt: skip
WORDS = (
    32  # of a thread's counters: the last record's cycle count, then a sum for each phase; whole cache lines
)


@inline
def start(profile, rank):
    """Start this thread's counters: their address, or 0 where there are none."""
    if not profile:
        return 0
    own = i64_at(profile, rank * WORDS)
    as_i64(own)[0] = cycle_counter()
    return own


@inline
def record(own, phase):
    """Add the cycles since the last record to `phase`."""
    if own:
        sums, now = as_i64(own), cycle_counter()
        sums[1 + phase] += now - sums[0]
        sums[0] = now


@kernel
def read_counter(rank, size, control, call):
    """Write the cycle counter to the address that is the first argument."""
    as_i64(as_i64(call)[0])[0] = cycle_counter()


def make_counters(threads: int) -> np.ndarray:
    """Zeroed counters, int64 [threads, WORDS]."""
    return np.zeros((threads, WORDS), dtype=np.int64)
