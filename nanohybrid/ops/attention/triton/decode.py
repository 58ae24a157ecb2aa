"""Paged decode attention in a fixed number of parts of the context, then one softmax (FlashDecoding).

The query heads of one key head are the rows of a tile, padded to 16, so a key is read once for all of them. A
part has whole steps of keys: 16 parts of one step cover 1,024 tokens, longer contexts have longer parts. All
exponentials have base two.

X parts · H query heads · K key/value heads · P head dimension.
"""

import triton
import triton.language as tl

from nanohybrid.ops.attention.triton.online import add_keys

PARTS = 16


@triton.jit
def _keys_of_a_part(context, KEYS: tl.constexpr, COUNT: tl.constexpr):
    return tl.cdiv(tl.cdiv(context, KEYS), COUNT) * KEYS


@triton.jit
def part(
    q, key, value, o, weight, table, positions_S, pages, page_size: tl.constexpr, scale, K, H, P,
    TYPE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """o [S, H, X, P]: the softmax-weighted mean of the values of one part; weight [S, H, X]: log2 of the sum
    of its exponentials.
    """
    index, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(positions_S + sequence).to(tl.int32) + 1
    size = _keys_of_a_part(context, KEYS, COUNT)
    begin = index * size
    end = tl.minimum(begin + size, context)
    if begin < end:
        row, p = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        head = sequence * H + kv_head * (H // K) + row
        is_head, is_p = row < H // K, p < P
        own = is_head[:, None] & is_p[None, :]
        q_tile = tl.load(q + head[:, None] * P + p[None, :], mask=own, other=0).to(TYPE)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, WIDTH], tl.float32)
        for first in range(begin, end, KEYS):
            j = first + tl.arange(0, KEYS)
            is_key = j < end
            seen = is_key[None, :]
            top, total, mean = add_keys(
                q_tile, key, value, table + sequence * pages, j, is_key, seen, p, is_p, kv_head, K, P,
                page_size, scale, top, total, mean, TYPE,
            )  # fmt: skip
        to = head * COUNT + index
        tl.store(o + to[:, None] * P + p[None, :], mean / total[:, None], mask=own)
        tl.store(weight + to, top + tl.log2(total), mask=is_head)


@triton.jit
def combine(o, weight, out, positions_S, H, P, WIDTH: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr):
    """One head of one sequence: the weighted mean over the parts.

    A part without keys wrote nothing, and is not read.
    """
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    context = tl.load(positions_S + sequence).to(tl.int32) + 1
    x, p = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    used = x * _keys_of_a_part(context, KEYS, COUNT) < context
    row = sequence * H + head
    log_weight = tl.load(weight + row * COUNT + x, mask=used, other=float("-inf"))
    share = tl.exp2(log_weight - tl.max(log_weight, 0))
    share = share / tl.sum(share, 0)
    means = tl.load(
        o + (row * COUNT + x)[:, None] * P + p[None, :], mask=used[:, None] & (p < P)[None, :], other=0
    )
    tl.store(out + row * P + p, tl.sum(means * share[:, None], 0).to(out.dtype.element_ty), mask=p < P)
