"""Queries of a ragged batch against pages: a tile of neighbouring tokens of one sequence and one head, streaming over its keys.

H query heads · K key/value heads · P head dimension.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def queries(
    q, key, value, out, tile_X4, table, pages, page_size: tl.constexpr, scale, H, K, P,
    TYPE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)  # neighbours read the same keys at about the same time
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
        page = tl.load(table + sequence * pages + j // page_size, mask=is_key, other=0)
        at = ((page * page_size + j % page_size) * K + kv_head) * P
        k_tile = tl.load(key + at[None, :] + p[:, None], mask=is_key[None, :] & is_p[:, None], other=0).to(TYPE)
        score = tl.dot(q_tile, k_tile, input_precision="ieee") * (scale * LOG2E)
        score = tl.where(j[None, :] <= (position + i)[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))  # finite from the first step on: every query sees key 0
        grown = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v_tile = tl.load(value + at[:, None] + p[None, :], mask=is_key[:, None] & is_p[None, :], other=0).to(TYPE)
        mean = tl.dot(grown.to(TYPE), v_tile, mean * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(grown, 1)
        top = new_top
    tl.store(out + at_q, (mean / total[:, None]).to(out.dtype.element_ty), mask=own)
