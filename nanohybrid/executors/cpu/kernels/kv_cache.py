"""Keys and values on their way into a sequence's pages, and what is done to them and to queries before: QK-norm, rotary position.

Inside a page, keys and values lie as tile.py's panels, so that scores and sums are its tiles (flash.py); the pool's bytes are the
same, their order is this file's own:

    keys    [16 of them a panel][P/2][16][2] bfloat16      a query times a panel is 16 scores
    values  [16 of P a panel][PAGE/2][16][2] bfloat16      probabilities times a panel are 16 of the output
"""

from __future__ import annotations

import numpy as np

from nanohybrid.executors.cpu.kernels.call import ATTENTION, ATTENTION_AT
from nanohybrid.ops.numba.jit import called, inlined
from nanohybrid.ops.numba.llvm import floats, halves, words
from nanohybrid.ops.numba.panels import inverse_rms
from nanohybrid.ops.numba.scalars import narrow
from nanohybrid.ops.sizes import PAGE


@inlined
def turn(vector, gain, eps, head_dim, angles):
    """QK-norm (where `gain` is an address) and rotary position (where `angles` is: cos then sin of half the head) in place."""
    values = floats(vector)
    if gain:
        scale, weight = inverse_rms(vector, head_dim, eps), floats(gain)
        for i in range(head_dim):
            values[i] *= scale * weight[i]
    if angles:
        table, half = floats(angles), head_dim // 2
        for i in range(half):
            a, b = values[i], values[i + half]
            values[i] = a * table[i] - b * table[half + i]
            values[i + half] = b * table[i] + a * table[half + i]


@called
def remember(start, count, position, head, projected, columns, sizes, at, eps, pages, angles):
    """Write keys and values of one head, of the `count` tokens from row `start` on, into the sequence's pages."""
    queries, kv_heads = sizes[ATTENTION.heads], sizes[ATTENTION.kv_heads]
    head_dim = sizes[ATTENTION.head_dim]
    keys, values, numbers = halves(at[ATTENTION_AT.key]), halves(at[ATTENTION_AT.value]), words(pages)
    for t in range(count):
        row = projected + (start + t) * columns * 4
        key, value = row + (queries + head) * head_dim * 4, row + (queries + kv_heads + head) * head_dim * 4
        turn(
            key, at[ATTENTION_AT.k_norm], eps, head_dim, angles + (start + t) * head_dim * 4 if angles else 0
        )
        here, k, v = (position + t) % PAGE, floats(key), floats(value)
        base = (numbers[(position + t) // PAGE] * kv_heads + head) * PAGE * head_dim
        at_key = base + here // 16 * 16 * head_dim + here % 16 * 2
        at_value = base + here // 2 * 32 + here % 2
        for d in range(head_dim):
            keys[at_key + d // 2 * 32 + d % 2] = narrow(k[d])
            values[at_value + d // 16 * PAGE * 16 + d % 16 * 2] = narrow(v[d])
    here = (
        position + count - 1
    ) % PAGE  # tiles take eight values at a time, and those behind the last must not be garbage
    base = (numbers[(position + count - 1) // PAGE] * kv_heads + head) * PAGE * head_dim
    for behind in range(here + 1, (here // 8 + 1) * 8):
        for d in range(head_dim):
            values[base + d // 16 * PAGE * 16 + behind // 2 * 32 + d % 16 * 2 + behind % 2] = np.uint16(0)
