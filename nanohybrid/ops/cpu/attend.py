"""Attention over a sequence's pages, for one key/value head and the query heads that share it: prompts and single tokens alike.

Inside a page, keys and values lie as tile.py's panels, so that scores and sums are its tiles; the pool's bytes are the same, their
order is this file's own:

    keys    [16 of them a panel][P/2][16][2] bfloat16      a query times a panel is 16 scores
    values  [16 of P a panel][PAGE/2][16][2] bfloat16      probabilities times a panel are 16 of the output

Softmax goes page by page with a running maximum and sum. A row's result is the same bits in any tile and any batch: pages begin at
absolute positions, sums run over all of a page in one order, and what is masked adds exact zeros.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.cpu.compiled import inlined
from nanohybrid.ops.cpu.linear import run_tile, tile_panels, tile_rows
from nanohybrid.ops.cpu.llvm import floats, halves, words
from nanohybrid.ops.cpu.rows import inverse_rms, pack_values
from nanohybrid.ops.cpu.scalars import exp, narrow
from nanohybrid.ops.sizes import PAGE

TALLEST = 12  # rows of a tile at most
LEAST = np.float32(-3e38)


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


@inlined
def remember(start, count, position, head, projected, columns, sizes, at, eps, pages, angles):
    """Write keys and values of one head, of the `count` tokens from row `start` on, into the sequence's pages."""
    queries, kv_heads, head_dim = sizes[0], sizes[1], sizes[2]
    keys, values, numbers = halves(at[0]), halves(at[1]), words(pages)
    for t in range(count):
        row = projected + (start + t) * columns * 4
        key, value = row + (queries + head) * head_dim * 4, row + (queries + kv_heads + head) * head_dim * 4
        turn(key, at[3], eps, head_dim, angles + (start + t) * head_dim * 4 if angles else 0)
        here, k, v = (position + t) % PAGE, floats(key), floats(value)
        base = (numbers[(position + t) // PAGE] * kv_heads + head) * PAGE * head_dim
        at_key = base + here // 16 * 16 * head_dim + here % 16 * 2
        at_value = base + here // 2 * 32 + here % 2
        for d in range(head_dim):
            keys[at_key + d // 2 * 32 + d % 2] = narrow(k[d])
            values[at_value + d // 16 * PAGE * 16 + d % 16 * 2] = narrow(v[d])
    here = (position + count - 1) % PAGE  # tiles take eight values at a time, and those behind the last must not be garbage
    base = (numbers[(position + count - 1) // PAGE] * kv_heads + head) * PAGE * head_dim
    for behind in range(here + 1, (here // 8 + 1) * 8):
        for d in range(head_dim):
            values[base + d // 16 * PAGE * 16 + behind // 2 * 32 + d % 16 * 2 + behind % 2] = np.uint16(0)


@inlined
def tiles_of(count, sizes):
    """How many tiles `attend` cuts the queries of `count` tokens and one key/value head into."""
    rows = count * (sizes[0] // sizes[1])
    height = tile_rows(rows)
    return (rows + height - 1) // height


@inlined
def attend(tile, start, count, position, head, projected, columns, sizes, at, eps, pages, angles, room, packed, tile_height, width):
    """One tile of queries of one head over all that they may see; rows of a tile are tokens times the heads that share the keys.

    `room`: scratch; what comes out goes to `packed`, at the tokens' rows.
    """
    queries, kv_heads, head_dim = sizes[0], sizes[1], sizes[2]
    each = queries // kv_heads
    total = count * each
    height = tile_rows(total)
    first, rows = tile * height, min(height, total - tile * height)
    q, scores = room, room + TALLEST * head_dim * 4
    chances = scores + TALLEST * PAGE * 4
    part = chances + TALLEST * PAGE * 2
    so_far = part + TALLEST * head_dim * 4
    sums, most = floats(so_far), floats(so_far + TALLEST * head_dim * 4)
    weight = floats(so_far + TALLEST * (head_dim + 1) * 4)
    for r in range(height):
        index = first + (r if r < rows else 0)
        row = start + index // each
        query = projected + (row * columns + (head * each + index % each) * head_dim) * 4
        if r < rows:
            turn(query, at[2], eps, head_dim, angles + row * head_dim * 4 if angles else 0)
        pack_values(query, head_dim, q, r, 0, height, head_dim)
        most[r], weight[r] = LEAST, np.float32(0)
        for i in range(head_dim):
            sums[r * head_dim + i] = np.float32(0)
    numbers, keys_bytes = words(pages), PAGE * head_dim * 2
    last = position + (first + rows - 1) // each
    for page in range(0, last + 1, PAGE):
        base = (numbers[page // PAGE] * kv_heads + head) * keys_bytes
        _scores(height, at[0] + base, q, scores, head_dim)
        for r in range(rows):
            seen = position + (first + r) // each + 1 - page
            _softmax(r, min(max(seen, 0), PAGE), scores, chances, height, head_dim, so_far, most, weight)
        _weigh(height, at[1] + base, chances, part, head_dim, (min(last + 1 - page, PAGE) + 7) // 8 * 4)
        added = floats(part)
        for i in range(rows * head_dim):
            sums[i] += added[i]
    for r in range(rows):
        scale = np.float32(1) / weight[r]
        for i in range(head_dim):
            sums[r * head_dim + i] *= scale
        token, column = start + (first + r) // each, (head * each + (first + r) % each) * head_dim
        pack_values(so_far + r * head_dim * 4, head_dim, packed, token, column, tile_height, width)


@inlined
def _scores(height, keys, q, scores, head_dim):
    """All scores of a page."""
    panels = tile_panels(height)
    for panel in range(0, PAGE // 16, panels):
        run_tile(0, height, panels, keys + panel * head_dim * 32, head_dim * 32, 0, q, scores + panel * 64, PAGE * 4, 1, head_dim // 2, 0)


@inlined
def _softmax(r, seen, scores, chances, height, head_dim, sums, most, weight):
    """Scores of one row -> probabilities against the running maximum, packed; what was summed so far shrinks accordingly."""
    row, kept, out = floats(scores + r * PAGE * 4), floats(sums), halves(chances)
    scale, top = np.float32(1.0 / math.sqrt(head_dim)), most[r]
    for t in range(seen):
        row[t] *= scale
        top = row[t] if row[t] > top else top
    shrink, total = exp(most[r] - top), np.float32(0)
    for t in range(PAGE):
        chance = exp(row[t] - top)
        row[t] = chance if t < seen else np.float32(0)
    for t in range(PAGE):
        total += row[t]
    for t in range(PAGE // 2):
        out[(t * height + r) * 2] = narrow(row[2 * t])
        out[(t * height + r) * 2 + 1] = narrow(row[2 * t + 1])
    for i in range(head_dim):
        kept[r * head_dim + i] *= shrink
    most[r], weight[r] = top, weight[r] * shrink + total


@inlined
def _weigh(height, values, chances, part, head_dim, pairs):
    """Probabilities times the first 2 * `pairs` values of a page."""
    panels, all_panels = tile_panels(height), head_dim // 16
    panels = panels if all_panels % panels == 0 else 1
    for panel in range(0, all_panels, panels):
        run_tile(0, height, panels, values + panel * PAGE * 32, PAGE * 32, 0, chances, part + panel * 64, head_dim * 4, 1, pairs, 0)


@inlined
def attention_room(sizes):
    """fp32 numbers of scratch that `attend` needs."""
    return TALLEST * (3 * sizes[2] + PAGE + PAGE // 2 + 2)
