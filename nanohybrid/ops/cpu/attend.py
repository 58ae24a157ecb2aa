"""Attention of one new token over a sequence's pages, for one key/value head and the query heads that share it.

Scores, their running maximum and sum, and the weighted values are kept page by page, so that nothing grows with the context.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.cpu.compiled import inlined
from nanohybrid.ops.cpu.llvm import floats, halves, words
from nanohybrid.ops.cpu.rows import inverse_rms, place
from nanohybrid.ops.cpu.scalars import exp, narrow, widen


@inlined
def turn(vector, gain, eps, head_dim, angles):  # type: ignore[no-untyped-def]
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


@inlined
def attend_head(row, head, projected, sizes, at, eps, keys, values, pages, position, angles, room, packed, tile_rows, width):  # type: ignore[no-untyped-def]
    """Key/value head `head` of one sequence. `projected`: its row of q | k | v in fp32; `keys`, `values`: the pools' addresses;
    `pages`: the sequence's page numbers; `room`: fp32 scratch; what comes out is packed."""
    queries, kv_heads, head_dim, page_size = sizes[0], sizes[1], sizes[2], sizes[3]
    each = queries // kv_heads
    q = projected + head * each * head_dim * 4
    k = projected + (queries + head) * head_dim * 4
    v = projected + (queries + kv_heads + head) * head_dim * 4
    turn(k, at[1], eps, head_dim, angles)
    for j in range(each):
        turn(q + j * head_dim * 4, at[0], eps, head_dim, angles)
    numbers = words(pages)
    stride = kv_heads * head_dim  # between the rows of a page
    here = (numbers[position // page_size] * page_size + position % page_size) * stride + head * head_dim
    key_pool, value_pool, new_key, new_value = halves(keys), halves(values), floats(k), floats(v)
    for i in range(head_dim):
        key_pool[here + i] = narrow(new_key[i])
        value_pool[here + i] = narrow(new_value[i])

    query = floats(q)
    scores, sums = floats(room), floats(room + each * page_size * 4)
    most, weight = floats(room + each * (page_size + head_dim) * 4), floats(room + each * (page_size + head_dim + 1) * 4)
    for i in range(each * head_dim):
        sums[i] = np.float32(0)
        query[i] = query[i] * np.float32(1.0 / math.sqrt(head_dim))
    for j in range(each):
        most[j] = np.float32(-3e38)
        weight[j] = np.float32(0)
    for first in range(0, position + 1, page_size):
        count = min(page_size, position + 1 - first)
        base = numbers[first // page_size] * page_size * stride + head * head_dim
        for t in range(count):
            key = base + t * stride
            for j in range(each):
                score = np.float32(0)
                for i in range(head_dim):
                    score += query[j * head_dim + i] * widen(key_pool[key + i])
                scores[j * page_size + t] = score
        for j in range(each):
            top = most[j]
            for t in range(count):
                top = scores[j * page_size + t] if scores[j * page_size + t] > top else top
            shrink = exp(most[j] - top)
            total = weight[j] * shrink
            for t in range(count):
                e = exp(scores[j * page_size + t] - top)
                scores[j * page_size + t] = e
                total += e
            for i in range(head_dim):
                sums[j * head_dim + i] *= shrink
            most[j], weight[j] = top, total
        for t in range(count):
            value = base + t * stride
            for j in range(each):
                e = scores[j * page_size + t]
                for i in range(head_dim):
                    sums[j * head_dim + i] += e * widen(value_pool[value + i])
    out = halves(packed)
    for j in range(each):
        scale = np.float32(1) / weight[j]
        for i in range(head_dim):
            out[place(row, (head * each + j) * head_dim + i, tile_rows, width)] = narrow(sums[j * head_dim + i] * scale)


@inlined
def attention_room(sizes):  # type: ignore[no-untyped-def]
    """fp32 numbers of scratch that `attend_head` needs."""
    return sizes[0] // sizes[1] * (sizes[3] + sizes[2] + 2)
