"""Queries of a ragged batch against pages: a tile of neighboring tokens of one head, over its keys.

H query heads · K key/value heads · P head dimension.
"""

import triton
import triton.language as tl

from nanohybrid.ops.attention.triton.online import add_keys


@triton.jit
def queries(
    q, key, value, out, tile_X4, table, pages, page_size: tl.constexpr, scale, H, K, P,
    TYPE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out [T, H, P]. tile_X4: rows of `tables.tiles`."""
    head = tl.program_id(0)  # neighboring programs read the same keys at about the same time
    tile = tile_X4 + tl.program_id(1) * 4
    token, sequence = tl.load(tile), tl.load(tile + 3)
    count, position = tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    i, p = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    is_p, kv_head = p < P, head // (H // K)
    own = (i < count)[:, None] & is_p[None, :]
    at_q = ((token + i) * H + head)[:, None] * P + p[None, :]
    q_tile = tl.load(q + at_q, mask=own, other=0).to(TYPE)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(0, position + count, KEYS):
        j = first + tl.arange(0, KEYS)
        is_key = j < position + count
        seen = j[None, :] <= (position + i)[:, None]
        top, total, mean = add_keys(
            q_tile, key, value, table + sequence * pages, j, is_key, seen, p, is_p, kv_head, K, P, page_size,
            scale, top, total, mean, TYPE,
        )  # fmt: skip
    tl.store(out + at_q, (mean / total[:, None]).to(out.dtype.element_ty), mask=own)
