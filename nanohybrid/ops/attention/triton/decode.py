"""Paged decode: the context of a sequence in a fixed number of parts, and one softmax over what they found.

The query heads of one key head stand as the rows of a tile, padded to 16, so that a key is read once for all of them. A part
holds whole steps of keys: 16 parts of one step serve 1,024 tokens, longer contexts make longer parts. Exponentials are of
base two throughout.

X parts · H query heads · K key/value heads · P head dimension.
"""

import triton
import triton.language as tl

PARTS = 16
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _keys_of_a_part(context, KEYS: tl.constexpr, COUNT: tl.constexpr):
    return tl.cdiv(tl.cdiv(context, KEYS), COUNT) * KEYS


@triton.jit
def part(
    q, key, value, o, weight, table, positions_S, pages, page_size: tl.constexpr, scale, K, H, P,
    TYPE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """o [S, H, X, P]: the mean of the values of one part of the context; weight [S, H, X]: log2 of the sum of its exponentials."""
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
            page = tl.load(table + sequence * pages + j // page_size, mask=is_key, other=0)
            at = ((page * page_size + j % page_size) * K + kv_head) * P
            k_tile = tl.load(key + at[None, :] + p[:, None], mask=is_key[None, :] & is_p[:, None], other=0).to(TYPE)
            score = tl.dot(q_tile, k_tile, input_precision="ieee") * (scale * LOG2E)
            score = tl.where(is_key[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            grown = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            v_tile = tl.load(value + at[:, None] + p[None, :], mask=is_key[:, None] & is_p[None, :], other=0).to(TYPE)
            mean = tl.dot(grown.to(TYPE), v_tile, mean * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(grown, 1)
            top = new_top
        to = head * COUNT + index
        tl.store(o + to[:, None] * P + p[None, :], mean / total[:, None], mask=own)
        tl.store(weight + to, top + tl.log2(total), mask=is_head)


@triton.jit
def combine(o, weight, out, positions_S, H, P, WIDTH: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr):
    """One head of one sequence: the parts' means, weighed. A part that holds no key wrote nothing, and is not read."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    context = tl.load(positions_S + sequence).to(tl.int32) + 1
    x, p = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    used = x * _keys_of_a_part(context, KEYS, COUNT) < context
    row = sequence * H + head
    log_weight = tl.load(weight + row * COUNT + x, mask=used, other=float("-inf"))
    share = tl.exp2(log_weight - tl.max(log_weight, 0))
    share = share / tl.sum(share, 0)
    means = tl.load(o + (row * COUNT + x)[:, None] * P + p[None, :], mask=used[:, None] & (p < P)[None, :], other=0)
    tl.store(out + row * P + p, tl.sum(means * share[:, None], 0).to(out.dtype.element_ty), mask=p < P)
