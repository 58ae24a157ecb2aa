"""Writing keys and values into a sequence's pages; QK-norm and rotary positions of queries and keys.

Inside a page, keys and values are stored as GEMM panels (gemm_tile.py), so that attention's scores and sums
are its tiles (attention.py). A page has as many bytes as in the plain layout, in an order that only these
kernels read:

    keys    a panel of 16 tokens: [P/2][16][2] bfloat16           a query times a panel: 16 scores
    values  a panel of 16 channels: [PAGE/2][16][2] bfloat16      probabilities times a panel: 16 outputs
"""

from __future__ import annotations

import numpy as np

from nanohybrid.executors.cpu.kernels.call import ATTENTION, ATTENTION_MEMORY
from nanohybrid.ops.numba.jit import inline, noinline
from nanohybrid.ops.numba.memory import as_bf16, as_f32, as_i64, f32_at
from nanohybrid.ops.numba.panels import inverse_rms
from nanohybrid.ops.numba.scalars import f32_to_bf16
from nanohybrid.ops.sizes import PAGE


@inline
def qk_norm_and_rope(vector, gain, eps, head_dim, angles):
    """QK-norm of a query or key unless `gain` is 0, then its rotary position unless `angles` is 0; in place.

    angles: cos of half the head, then sin.
    """
    values = as_f32(vector)
    if gain:
        scale, weight = inverse_rms(vector, head_dim, eps), as_f32(gain)
        for i in range(head_dim):
            values[i] *= scale * weight[i]
    if angles:
        table, half = as_f32(angles), head_dim // 2
        for i in range(half):
            a, b = values[i], values[i + half]
            values[i] = a * table[i] - b * table[half + i]
            values[i + half] = b * table[i] + a * table[half + i]


@noinline
def write_kv(start, count, position, head, projected, columns, sizes, memory, eps, pages, angles):
    """Write one head's keys and values into the sequence's pages, for `count` tokens from row `start` on."""
    queries, kv_heads, head_dim = sizes[ATTENTION.heads], sizes[ATTENTION.kv_heads], sizes[ATTENTION.head_dim]
    keys, values = as_bf16(memory[ATTENTION_MEMORY.key]), as_bf16(memory[ATTENTION_MEMORY.value])
    page_ids = as_i64(pages)
    for t in range(count):
        row = f32_at(projected, (start + t) * columns)
        key = f32_at(row, (queries + head) * head_dim)
        value = f32_at(row, (queries + kv_heads + head) * head_dim)
        own_angles = f32_at(angles, (start + t) * head_dim) if angles else 0
        qk_norm_and_rope(key, memory[ATTENTION_MEMORY.k_norm], eps, head_dim, own_angles)
        offset, k, v = (position + t) % PAGE, as_f32(key), as_f32(value)
        base = (page_ids[(position + t) // PAGE] * kv_heads + head) * PAGE * head_dim
        key_index = base + offset // 16 * 16 * head_dim + offset % 16 * 2
        value_index = base + offset // 2 * 32 + offset % 2
        for d in range(head_dim):
            keys[key_index + d // 2 * 32 + d % 2] = f32_to_bf16(k[d])
            values[value_index + d // 16 * PAGE * 16 + d % 16 * 2] = f32_to_bf16(v[d])
    # Tiles read eight values at a time: zero those after the last token, which may be NaN.
    offset = (position + count - 1) % PAGE
    base = (page_ids[(position + count - 1) // PAGE] * kv_heads + head) * PAGE * head_dim
    for after in range(offset + 1, (offset // 8 + 1) * 8):
        for d in range(head_dim):
            values[base + d // 16 * PAGE * 16 + after // 2 * 32 + d % 16 * 2 + after % 2] = np.uint16(0)
