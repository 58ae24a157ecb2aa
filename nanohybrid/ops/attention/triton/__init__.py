"""Attention on a GPU over pages: decode split over the context, and queries of any ragged batch. Neither copies a key.

Sequences that all begin in this batch go through torch's scaled_dot_product_attention, which has everything it needs in the
batch and is tuned for that; so does training, which has no pages.

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
from nanohybrid.ops.launch import LEAST_DOT, operand, power
from nanohybrid.ops.layout import Layout

if TYPE_CHECKING:
    from nanohybrid.ops.attention import PagedCache

KEYS = 64  # a step of either loop
QUERIES = 64  # of one head, in a program of prefill


def attention(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, cache: PagedCache | None = None
) -> Tensor:
    """o_THP in q's dtype; products take operands in it, sums and softmax are fp32."""
    if cache is None or not (layout.continues or layout.is_decode):
        return torch_form.attention(q_THP, k_TKP, v_TKP, layout, cache)
    pages.write(cache.key, k_TKP, layout)
    pages.write(cache.value, v_TKP, layout)
    return (decode_attention if layout.is_decode else prefill_attention)(q_THP, layout, cache)


def decode_attention(q_SHP: Tensor, layout: Layout, cache: PagedCache) -> Tensor:
    """One token of each sequence against its pages, which hold it already.

    The context is cut into 16 parts whatever its length and whatever else is in the batch, so a sequence's sums are made in
    the same order alone and among others.
    """
    (S, H, P), K = q_SHP.shape, cache.key.shape[2]
    table, positions_S = page_table(layout, q_SHP.device), layout.token_positions(q_SHP.device)
    o_SHXP = q_SHP.new_empty(S, H, decode.PARTS, P, dtype=torch.float32)
    weight_SHX = q_SHP.new_empty(S, H, decode.PARTS, dtype=torch.float32)
    shared = {"H": H, "P": P, "WIDTH": power(P, LEAST_DOT), "KEYS": KEYS}
    decode.part[(decode.PARTS, K, S)](
        q_SHP.contiguous(), cache.key, cache.value, o_SHXP, weight_SHX, table, positions_S, table.shape[1], layout.page_size,
        P**-0.5, K, **shared, TYPE=operand(q_SHP.dtype), ROWS=power(H // K, LEAST_DOT), COUNT=decode.PARTS, num_warps=4, num_stages=2,
    )  # fmt: skip
    o_SHP = torch.empty_like(q_SHP, memory_format=torch.contiguous_format)
    decode.combine[(H, S)](o_SHXP, weight_SHX, o_SHP, positions_S, **shared, COUNT=decode.PARTS)
    return o_SHP


def prefill_attention(q_THP: Tensor, layout: Layout, cache: PagedCache) -> Tensor:
    """Any ragged batch, each token against the pages of its sequence, which hold this batch already."""
    (_, H, P), K = q_THP.shape, cache.key.shape[2]
    table, tile_X4 = page_table(layout, q_THP.device), tiles(layout, QUERIES, q_THP.device)
    o_THP = torch.empty_like(q_THP, memory_format=torch.contiguous_format)
    prefill.queries[(H, len(tile_X4))](
        q_THP.contiguous(), cache.key, cache.value, o_THP, tile_X4, table, table.shape[1], layout.page_size, P**-0.5, H, K, P,
        TYPE=operand(q_THP.dtype), QUERIES=QUERIES, KEYS=KEYS, WIDTH=power(P, LEAST_DOT), num_warps=4, num_stages=2,
    )  # fmt: skip
    return o_THP
