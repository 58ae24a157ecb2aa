"""Attention over pages on a GPU: decode steps split over the context, and queries of any ragged batch.

No keys are copied.

Sequences that begin in this batch use torch's scaled_dot_product_attention: all their keys are in the batch.
So does training, which has no pages.

T tokens · S sequences · H query heads · K key/value heads · P head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanohybrid.ops.attention import pages
from nanohybrid.ops.attention import torch as torch_form
from nanohybrid.ops.attention.triton import decode, prefill
from nanohybrid.ops.attention.triton.tables import page_table, tiles
from nanohybrid.ops.launch import MIN_DOT, dot_dtype, next_power_of_2
from nanohybrid.ops.layout import Layout

if TYPE_CHECKING:
    from nanohybrid.ops.attention import PagedCache

KEYS = 64  # per iteration of both loops
QUERIES = 64  # of one head, per program of `queries`


def attention(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, cache: PagedCache | None = None
) -> Tensor:
    """o_THP in q's dtype. The operands of products are in q's dtype; sums and softmax are fp32."""
    if cache is None or not (layout.continues or layout.is_decode):
        return torch_form.attention(q_THP, k_TKP, v_TKP, layout, cache)
    pages.write(cache.key, k_TKP, layout)
    pages.write(cache.value, v_TKP, layout)
    return (decode_attention if layout.is_decode else prefill_attention)(q_THP, layout, cache)


def decode_attention(q_SHP: Tensor, layout: Layout, cache: PagedCache) -> Tensor:
    """One token of each sequence against its pages, to which the token is already written.

    The context is always split into 16 parts, whatever its length and the rest of the batch. So a sequence's
    sums have the same order alone and in a batch.
    """
    (S, H, P), K = q_SHP.shape, cache.key.shape[2]
    table, positions_S = page_table(layout, q_SHP.device), layout.token_positions(q_SHP.device)
    o_SHXP = q_SHP.new_empty(S, H, decode.PARTS, P, dtype=torch.float32)
    weight_SHX = q_SHP.new_empty(S, H, decode.PARTS, dtype=torch.float32)
    shared = {"H": H, "P": P, "WIDTH": next_power_of_2(P, MIN_DOT), "KEYS": KEYS}
    decode.part[(decode.PARTS, K, S)](
        q_SHP.contiguous(), cache.key, cache.value, o_SHXP, weight_SHX, table, positions_S, table.shape[1],
        layout.page_size, P**-0.5, K, **shared, TYPE=dot_dtype(q_SHP.dtype), ROWS=next_power_of_2(H // K,
        MIN_DOT), COUNT=decode.PARTS, num_warps=4, num_stages=2,
    )  # fmt: skip
    o_SHP = torch.empty_like(q_SHP, memory_format=torch.contiguous_format)
    decode.combine[(H, S)](o_SHXP, weight_SHX, o_SHP, positions_S, **shared, COUNT=decode.PARTS)
    return o_SHP


def prefill_attention(q_THP: Tensor, layout: Layout, cache: PagedCache) -> Tensor:
    """Any ragged batch, each token against the pages of its sequence, which already have the batch."""
    (_, H, P), K = q_THP.shape, cache.key.shape[2]
    table, tile_X4 = page_table(layout, q_THP.device), tiles(layout, QUERIES, q_THP.device)
    o_THP = torch.empty_like(q_THP, memory_format=torch.contiguous_format)
    prefill.queries[(H, len(tile_X4))](
        q_THP.contiguous(), cache.key, cache.value, o_THP, tile_X4, table, table.shape[1], layout.page_size,
        P**-0.5, H, K, P, TYPE=dot_dtype(q_THP.dtype), QUERIES=QUERIES, KEYS=KEYS, WIDTH=next_power_of_2(P,
        MIN_DOT), num_warps=4, num_stages=2,
    )  # fmt: skip
    return o_THP
