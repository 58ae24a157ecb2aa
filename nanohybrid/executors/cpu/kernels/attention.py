"""Attention over a sequence's pages, for one key/value head and the query heads that share it: prompts and single tokens alike.

Rows are tokens times the heads that share the keys. A block of rows goes through the pages together, so that a page's keys and
values come from memory once for all of them; in it a tile of rows at a time is multiplied by a page, its scores and probabilities
staying in the first level of cache. No more of the scores than that ever exists, however long the context.

Softmax goes page by page with a running maximum and sum (softmax.py), and probabilities times values are added to the running
output itself, token by token. A row's result is the same bits in any tile, block and batch: pages begin at absolute positions,
sums run through a page in one order, and what is masked adds exact zeros.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.executors.cpu.kernels.call import ATTENTION, ATTENTION_AT
from nanohybrid.executors.cpu.kernels.gemm import run_tile, tile_panels, tile_rows
from nanohybrid.executors.cpu.kernels.gemm_tile import make_tiles
from nanohybrid.executors.cpu.kernels.kv_cache import turn
from nanohybrid.executors.cpu.kernels.softmax import LEAST, make_softmax
from nanohybrid.ops.numba.jit import called, inlined
from nanohybrid.ops.numba.llvm import floats, words
from nanohybrid.ops.numba.panels import pack_values
from nanohybrid.ops.numba.scalars import LOG2_E
from nanohybrid.ops.sizes import PAGE

TALLEST = 12  # rows of a tile at most
TILES = 8  # of a block: memory then has the time of eight tiles for a page
BLOCK = TILES * TALLEST

_whole, _partial = make_softmax()
_HEIGHTS = ((1, 4), (2, 4), (4, 4), (8, 2), (12, 2))  # as linear.py's
_added_tiles = make_tiles(
    [("bf16", *shape) for shape in _HEIGHTS] + [("bf16", rows, 1) for rows, _ in _HEIGHTS], apart=PAGE * 2
)


@inlined
def blocks_of(count, sizes):
    """How many blocks `attend` cuts the queries of `count` tokens and one key/value head into."""
    rows = count * (sizes[ATTENTION.heads] // sizes[ATTENTION.kv_heads])
    height = tile_rows(rows) * TILES
    return (rows + height - 1) // height


@called
def attend(
    block,
    start,
    count,
    position,
    head,
    projected,
    columns,
    sizes,
    at,
    eps,
    pages,
    angles,
    room,
    packed,
    tile_height,
    width,
):
    """One block of queries of one head over all that they may see. `room`: scratch; the outputs go to `packed`, at the tokens' rows."""
    queries, kv_heads = sizes[ATTENTION.heads], sizes[ATTENTION.kv_heads]
    head_dim = sizes[ATTENTION.head_dim]
    each = queries // kv_heads
    height = tile_rows(count * each)
    first = block * height * TILES
    rows = min(height * TILES, count * each - first)
    q, sums, most, weights, scores = _places(room, head_dim)
    for r in range((rows + height - 1) // height * height):
        index = first + (r if r < rows else 0)
        row = start + index // each
        query = projected + (row * columns + (head * each + index % each) * head_dim) * 4
        if r < rows:
            turn(query, at[ATTENTION_AT.q_norm], eps, head_dim, angles + row * head_dim * 4 if angles else 0)
        pack_values(query, head_dim, q, r, 0, height, head_dim)
        _clear(sums + r * head_dim * 4, head_dim, most + r * 4, weights + r * 64)
    numbers, page_bytes = words(pages), PAGE * head_dim * 2
    last = position + (first + rows - 1) // each
    for page in range(0, last + 1, PAGE):
        base = (numbers[page // PAGE] * kv_heads + head) * page_bytes
        ahead = (
            (numbers[page // PAGE + 1] * kv_heads + head) * page_bytes - base if page + PAGE <= last else 0
        )
        for r in range(0, rows, height):
            mine = min(height, rows - r)
            seen = position + (first + r + mine - 1) // each + 1 - page  # by the tile's last row
            if seen > 0:
                _multiply_keys(
                    height,
                    at[ATTENTION_AT.key] + base,
                    q + r * head_dim * 2,
                    scores,
                    head_dim,
                    min(seen, PAGE),
                    ahead,
                )
                _weigh(mine, first + r, each, position - page, min(seen, PAGE), scores, head_dim, sums + r * head_dim * 4, most + r * 4,
                       weights + r * 64)  # fmt: skip
                _add_values(
                    height,
                    at[ATTENTION_AT.value] + base,
                    scores + TALLEST * PAGE * 4,
                    sums + r * head_dim * 4,
                    head_dim,
                    min(seen, PAGE),
                    ahead,
                )
    for r in range(rows):
        row = sums + r * head_dim * 4
        _scale(row, head_dim, np.float32(1) / _total(weights + r * 64))
        token, column = start + (first + r) // each, (head * each + (first + r) % each) * head_dim
        pack_values(row, head_dim, packed, token, column, tile_height, width)


@inlined
def _places(room, head_dim):
    """Where in the scratch: queries, sums, maxima and weights of a block's rows; scores of a tile, its probabilities behind them."""
    q = room
    sums = q + BLOCK * head_dim * 2
    most = sums + BLOCK * head_dim * 4
    weights = most + BLOCK * 4
    return q, sums, most, weights, weights + BLOCK * 64


@inlined
def attention_room(sizes):
    """fp32 numbers of scratch that `attend` needs."""
    return BLOCK * (sizes[ATTENTION.head_dim] // 2 + sizes[ATTENTION.head_dim] + 1 + 16) + TALLEST * (
        PAGE + PAGE // 2
    )


@inlined
def _clear(sums, head_dim, most, weights):
    """A row before its first page."""
    out, lanes = floats(sums), floats(weights)
    for i in range(head_dim):
        out[i] = np.float32(0)
    for i in range(16):
        lanes[i] = np.float32(0)
    floats(most)[0] = np.float32(LEAST)


@inlined
def _multiply_keys(height, keys, q, scores, head_dim, seen, ahead):
    """Scores of a tile with the first `seen` tokens of a page, and a few more."""
    panels, step = tile_panels(height), head_dim * 32
    for panel in range(0, (seen + 15) // 16, panels):
        run_tile(
            0,
            height,
            panels,
            keys + panel * step,
            step,
            0,
            q,
            scores + panel * 64,
            PAGE * 4,
            1,
            head_dim // 2,
            ahead,
        )


@inlined
def _weigh(rows, first, each, behind, seen, scores, head_dim, sums, most, weights):
    """Scores of a tile -> probabilities against the running maxima; where a maximum rises, what was summed so far shrinks."""
    scale, chances = np.float32(LOG2_E / math.sqrt(head_dim)), scores + TALLEST * PAGE * 4
    for r in range(rows):
        row, out, here = scores + r * PAGE * 4, chances + r * PAGE * 2, behind + (first + r) // each + 1
        if here >= PAGE:
            shrink = _whole(row, out, scale, most + r * 4, weights + r * 64)
        else:
            shrink = _partial(row, out, scale, most + r * 4, weights + r * 64, here, (seen + 15) // 16)
        if shrink != np.float32(1):
            _scale(sums + r * head_dim * 4, head_dim, shrink)


@inlined
def _add_values(height, values, chances, sums, head_dim, seen, ahead):
    """sums += probabilities times the first `seen` values of a page, and those up to a multiple of 8, which are zeros or not seen."""
    panels, all_panels, pairs = tile_panels(height), head_dim // 16, (seen + 7) // 8 * 4
    panels = panels if all_panels % panels == 0 else 1
    for panel in range(0, all_panels, panels):
        w = values + panel * PAGE * 32
        _added_tiles(
            0, height, panels, w, PAGE * 32, 0, chances, sums + panel * 64, head_dim * 4, 1, pairs, ahead
        )


@inlined
def _scale(values, count, by):
    numbers = floats(values)
    for i in range(count):
        numbers[i] *= by


@inlined
def _total(weights):
    lanes, total = floats(weights), np.float32(0)
    for i in range(16):
        total += lanes[i]
    return total
