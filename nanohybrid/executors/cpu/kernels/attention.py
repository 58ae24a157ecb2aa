"""Attention over a sequence's pages, for one key/value head and the query heads that share it; prompts and
single tokens alike.

Rows are tokens times the query heads that share the keys. A block of rows goes through the pages together, so
a page's keys and values are read from memory once for all of them. Within the block, one tile of rows at a
time is multiplied by a page; its scores and probabilities stay in the L1 cache. No more of the score matrix
exists at a time, however long the context.

The softmax is online, page by page, with a running maximum and sum (softmax.py), as in FlashAttention (Dao et
al. 2022). Probabilities times values are added to the running output token by token. A row's result has the
same bits in any tile, block and batch: pages begin at absolute positions, sums run through a page in one
order, and masked tokens add exact zeros.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.executors.cpu.kernels.call import ATTENTION, ATTENTION_MEMORY
from nanohybrid.executors.cpu.kernels.gemm import TILE_SHAPES, run_tile, tile_panels, tile_rows
from nanohybrid.executors.cpu.kernels.gemm_tile import make_tiles
from nanohybrid.executors.cpu.kernels.kv_cache import qk_norm_and_rope
from nanohybrid.executors.cpu.kernels.softmax import INITIAL_MAX, make_softmax
from nanohybrid.ops.numba.jit import inline, noinline
from nanohybrid.ops.numba.memory import BF16_BYTES, F32_BYTES, as_f32, as_i64, bf16_at, f32_at
from nanohybrid.ops.numba.panels import pack_values
from nanohybrid.ops.numba.scalars import LOG2_E
from nanohybrid.ops.sizes import PAGE

MAX_TILE_ROWS = 12
TILES = 8  # of a block: while a page is loaded, eight tiles are computed
BLOCK_ROWS = TILES * MAX_TILE_ROWS
LANES = 16  # partial sums of a row's probabilities

_softmax_page, _softmax_masked = make_softmax()
_accumulating_tiles = make_tiles(
    [("bf16", *shape) for shape in TILE_SHAPES] + [("bf16", rows, 1) for rows, _ in TILE_SHAPES],
    row_stride=PAGE * BF16_BYTES,
)


@inline
def num_blocks(count, sizes):
    """How many blocks `attention_block` has for the queries of `count` tokens and one key/value head."""
    rows = count * (sizes[ATTENTION.heads] // sizes[ATTENTION.kv_heads])
    height = tile_rows(rows) * TILES
    return (rows + height - 1) // height


@noinline
def attention_block(
    block, start, count, position, head, projected, columns, sizes, memory, eps, pages, angles, scratch,
    packed, packed_tile_rows, width,
):  # fmt: skip
    """One block of queries of one key/value head, over all tokens that they may see.

    The `count` tokens are the rows of the batch from `start` on. scratch: `attention_scratch` fp32 numbers.
    The outputs go to the same rows of `packed`.
    """
    queries, kv_heads, head_dim = sizes[ATTENTION.heads], sizes[ATTENTION.kv_heads], sizes[ATTENTION.head_dim]
    each = queries // kv_heads
    height = tile_rows(count * each)
    first = block * height * TILES
    rows = min(height * TILES, count * each - first)
    q, sums, maxima, totals, scores = _scratch_addresses(scratch, head_dim)
    for r in range((rows + height - 1) // height * height):
        index = first + (r if r < rows else 0)
        row = start + index // each
        query = f32_at(projected, row * columns + (head * each + index % each) * head_dim)
        if r < rows:
            own_angles = f32_at(angles, row * head_dim) if angles else 0
            qk_norm_and_rope(query, memory[ATTENTION_MEMORY.q_norm], eps, head_dim, own_angles)
        pack_values(query, head_dim, q, r, 0, height, head_dim)
        _begin_row(f32_at(sums, r * head_dim), head_dim, f32_at(maxima, r), f32_at(totals, r * LANES))
    page_ids, page_bytes = as_i64(pages), PAGE * head_dim * BF16_BYTES
    last = position + (first + rows - 1) // each
    for page in range(0, last + 1, PAGE):
        base = (page_ids[page // PAGE] * kv_heads + head) * page_bytes
        prefetch = (
            (page_ids[page // PAGE + 1] * kv_heads + head) * page_bytes - base if page + PAGE <= last else 0
        )
        for r in range(0, rows, height):
            tile = min(height, rows - r)
            visible = position + (first + r + tile - 1) // each + 1 - page  # to the tile's last row
            if visible > 0:
                visible, row_sums = min(visible, PAGE), f32_at(sums, r * head_dim)
                keys, values = memory[ATTENTION_MEMORY.key] + base, memory[ATTENTION_MEMORY.value] + base
                probabilities = f32_at(scores, MAX_TILE_ROWS * PAGE)
                _multiply_keys(height, keys, bf16_at(q, r * head_dim), scores, head_dim, visible, prefetch)
                _softmax_tile(
                    tile, first + r, each, position - page, visible, scores, head_dim, row_sums,
                    f32_at(maxima, r), f32_at(totals, r * LANES),
                )  # fmt: skip
                _add_values(height, values, probabilities, row_sums, head_dim, visible, prefetch)
    for r in range(rows):
        row = f32_at(sums, r * head_dim)
        _scale(row, head_dim, np.float32(1) / _total(f32_at(totals, r * LANES)))
        token, column = start + (first + r) // each, (head * each + (first + r) % each) * head_dim
        pack_values(row, head_dim, packed, token, column, packed_tile_rows, width)


@inline
def _scratch_addresses(scratch, head_dim):
    """A block's queries, output sums, maxima and probability sums; a tile's scores and probabilities."""
    q = scratch
    sums = bf16_at(q, BLOCK_ROWS * head_dim)
    maxima = f32_at(sums, BLOCK_ROWS * head_dim)
    totals = f32_at(maxima, BLOCK_ROWS)
    return q, sums, maxima, totals, f32_at(totals, BLOCK_ROWS * LANES)


@inline
def attention_scratch(sizes):
    """fp32 numbers of scratch that `attention_block` needs."""
    head_dim = sizes[ATTENTION.head_dim]
    return BLOCK_ROWS * (head_dim // 2 + head_dim + 1 + LANES) + MAX_TILE_ROWS * (PAGE + PAGE // 2)


@inline
def _begin_row(sums, head_dim, maximum, totals):
    """A row before its first page."""
    out, lanes = as_f32(sums), as_f32(totals)
    for i in range(head_dim):
        out[i] = np.float32(0)
    for i in range(LANES):
        lanes[i] = np.float32(0)
    as_f32(maximum)[0] = np.float32(INITIAL_MAX)


@inline
def _multiply_keys(height, keys, q, scores, head_dim, visible, prefetch):
    """Scores of a tile with the first `visible` tokens of a page, rounded up to whole panels."""
    panels, panel_bytes = tile_panels(height), head_dim * 16 * BF16_BYTES
    for panel in range(0, (visible + 15) // 16, panels):
        run_tile(
            0, height, panels, keys + panel * panel_bytes, panel_bytes, 0, q, f32_at(scores, panel * 16),
            PAGE * F32_BYTES, 1, head_dim // 2, prefetch,
        )  # fmt: skip


@inline
def _softmax_tile(rows, first, each, offset, visible, scores, head_dim, sums, maxima, totals):
    """Scores of a tile -> probabilities relative to the running maxima.

    Where a maximum rises, the row's sums are rescaled.
    """
    scale, probabilities = np.float32(LOG2_E / math.sqrt(head_dim)), f32_at(scores, MAX_TILE_ROWS * PAGE)
    for r in range(rows):
        row, out = f32_at(scores, r * PAGE), bf16_at(probabilities, r * PAGE)
        maximum, total, seen = f32_at(maxima, r), f32_at(totals, r * LANES), offset + (first + r) // each + 1
        if seen >= PAGE:
            rescale = _softmax_page(row, out, scale, maximum, total)
        else:
            rescale = _softmax_masked(row, out, scale, maximum, total, seen, (visible + 15) // 16)
        if rescale != np.float32(1):
            _scale(f32_at(sums, r * head_dim), head_dim, rescale)


@inline
def _add_values(height, values, probabilities, sums, head_dim, visible, prefetch):
    """sums += probabilities times the first `visible` values of a page.

    Tokens are rounded up to a multiple of 8; the others add zeros.
    """
    panels, all_panels, pairs = tile_panels(height), head_dim // 16, (visible + 7) // 8 * 4
    panels = panels if all_panels % panels == 0 else 1
    panel_bytes = PAGE * 16 * BF16_BYTES
    for panel in range(0, all_panels, panels):
        _accumulating_tiles(
            0, height, panels, values + panel * panel_bytes, panel_bytes, 0, probabilities, f32_at(sums, panel
            * 16), head_dim * F32_BYTES, 1, pairs, prefetch,
        )  # fmt: skip


@inline
def _scale(values, count, by):
    """values *= by."""
    numbers = as_f32(values)
    for i in range(count):
        numbers[i] *= by


@inline
def _total(lanes):
    """The sum of LANES numbers."""
    numbers, total = as_f32(lanes), np.float32(0)
    for i in range(LANES):
        total += numbers[i]
    return total
