"""One iteration of paged attention with an online softmax: a tile of queries, the next keys.

K key/value heads · P head dimension. Exponentials have base two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_keys(
    q_tile, key, value, table, j, is_key, seen, p, is_p, kv_head, K, P, page_size: tl.constexpr, scale, top,
    total, mean, TYPE: tl.constexpr
):  # fmt: skip
    """The running maximum, sum and weighted mean after the keys at positions j.

    table: the sequence's pages. is_key: which of j may be read. seen: which of them each query may attend to.
    """
    page = tl.load(table + j // page_size, mask=is_key, other=0)
    at = ((page * page_size + j % page_size) * K + kv_head) * P
    k_tile = tl.load(key + at[None, :] + p[:, None], mask=is_key[None, :] & is_p[:, None], other=0).to(TYPE)
    score = tl.dot(q_tile, k_tile, input_precision="ieee") * (scale * LOG2E)
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(
        top, tl.max(score, 1)
    )  # finite from the first step: every query attends to a key of it
    grown = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    v_tile = tl.load(value + at[:, None] + p[None, :], mask=is_key[:, None] & is_p[None, :], other=0).to(TYPE)
    mean = tl.dot(grown.to(TYPE), v_tile, mean * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(grown, 1), mean
