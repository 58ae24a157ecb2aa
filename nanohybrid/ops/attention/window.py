"""Sliding-window attention over a ragged batch, with the last keys and values of each sequence in a ring.

    o_t = sum_{t - W < j <= t} softmax_j(q_t . k_j / sqrt(P)) v_j within each sequence

Token t of a sequence lies at row t mod R of its ring. A ring is longer than the window, so that draft tokens
can be written and rejected: a rejected token's row is written again before any token reads it.

T tokens · Z sequences side by side · L queries · C keys · W window · R rows of a ring · H query heads · K
key/value heads · P head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.attention.cache import dequantize, quantize
from nanohybrid.ops.dispatch import choose
from nanohybrid.ops.layout import Layout

QUERY_TILE = 256  # queries that share one mask


@dataclass(frozen=True)
class RingCache:
    """key and value [slots, R, K, P]; in FP8 also their scales [slots, R, K]."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> RingCache:
        """From a layer's cache, by name."""
        return cls(tensors["key"], tensors["value"], tensors.get("key_scale"), tensors.get("value_scale"))

    def write(self, k_TKP: Tensor, v_TKP: Tensor, layout: Layout) -> None:
        """Store the last R tokens of each sequence of the batch."""
        size = self.key.shape[1]

        def rows() -> np.ndarray:
            offsets, lengths = layout.offsets(), np.repeat(np.asarray(layout.lengths), layout.lengths)
            return np.flatnonzero(lengths - offsets <= size)

        def places() -> np.ndarray:
            positions = layout.offsets() + np.repeat(np.asarray(layout.positions), layout.lengths)
            slots = np.repeat(np.asarray(layout.slots), layout.lengths)
            return (slots * size + positions % size)[rows()]

        device = self.key.device
        rows_R = layout.tensor(f"ring rows {size}", device, rows)
        places_R = layout.tensor(f"ring places {size}", device, places)
        for pool, scale, given_TKP in (
            (self.key, self.key_scale, k_TKP),
            (self.value, self.value_scale, v_TKP),
        ):
            given_RKP = given_TKP[rows_R]
            if scale is None:
                pool.flatten(0, 1).index_copy_(0, places_R, given_RKP.to(pool.dtype))
            else:
                codes_RKP, scale_RK = quantize(given_RKP)
                bytes_ = pool.view(torch.uint8).flatten(0, 1)
                bytes_.index_copy_(0, places_R, codes_RKP.view(torch.uint8))
                scale.flatten(0, 1).index_copy_(0, places_R, scale_RK)

    def read(self, slots: list[int], positions: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` tokens before each position: keys and values [Z, count, K, P], zeros where there is
        none, and which there are, bool [Z, count].
        """
        device, size = self.key.device, self.key.shape[1]
        ends_Z = torch.tensor(positions, device=device)
        token_ZC = ends_Z[:, None] - count + torch.arange(count, device=device)
        valid_ZC = token_ZC >= 0
        slot_Z = torch.tensor(slots, device=device)
        found = []
        for pool, scale in ((self.key, self.key_scale), (self.value, self.value_scale)):
            if scale is None:
                rows_ZCKP = pool[slot_Z[:, None], token_ZC % size]
            else:
                codes_ZCKP = pool.view(torch.uint8)[slot_Z[:, None], token_ZC % size]
                rows_ZCKP = dequantize(codes_ZCKP, scale[slot_Z[:, None], token_ZC % size])
            found.append(
                rows_ZCKP.masked_fill(~valid_ZC[..., None, None], 0)
            )  # memory that was never written may hold NaN
        return found[0], found[1], valid_ZC


def window_attention(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, window: int, cache: RingCache | None = None
) -> Tensor:
    """o_THP in the dtype of q: each token attends to itself and the `window` - 1 tokens before it in its own
    sequence.

    With a cache, the tokens before this batch are read from the ring, and the batch is written to it. Query
    head h reads key head h // (H // K).
    """
    form = choose(q_THP, k_TKP, v_TKP, reference=_reference, torch=_torch)
    o_THP: Tensor = form(q_THP, k_TKP, v_TKP, layout, window, cache)
    if cache is not None:
        cache.write(k_TKP, v_TKP, layout)
    return o_THP


def _reference(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, window: int, cache: RingCache | None
) -> Tensor:
    """The equation, one query token at a time; sums in fp32 (float64 for float64)."""
    dtype = torch.promote_types(q_THP.dtype, torch.float32)
    queries_per_key, outputs = q_THP.shape[1] // k_TKP.shape[1], []
    for i, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=False)):
        k_CKP, v_CKP, before = _keys_of(k_TKP, v_TKP, layout, i, window, cache)
        k_CHP, v_CHP = (x.to(dtype).repeat_interleave(queries_per_key, dim=1) for x in (k_CKP, v_CKP))
        for t in range(length):
            last = before + t + 1
            seen = slice(max(0, last - window), last)
            scores_HC = torch.einsum("HP,CHP->HC", q_THP[start + t].to(dtype), k_CHP[seen])
            weights_HC = (scores_HC * q_THP.shape[2] ** -0.5).softmax(-1)
            outputs.append(torch.einsum("HC,CHP->HP", weights_HC, v_CHP[seen]))
    return torch.stack(outputs).to(q_THP.dtype)


def _torch(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, window: int, cache: RingCache | None
) -> Tensor:
    """By scaled_dot_product_attention: all sequences of a decode step at once, else by tiles of queries."""
    if cache is not None and layout.is_decode and layout.slots is not None:
        return _decode(q_THP, k_TKP, v_TKP, layout, window, cache)
    outputs = []
    for i, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=False)):
        k_CKP, v_CKP, before = _keys_of(k_TKP, v_TKP, layout, i, window, cache)
        for first in range(0, length, QUERY_TILE):
            last = min(first + QUERY_TILE, length)
            q_1HLP = q_THP[start + first : start + last].transpose(0, 1)[None]
            lowest = max(0, before + first - window + 1)
            k, v = (x[lowest : before + last].transpose(0, 1)[None].to(q_THP.dtype) for x in (k_CKP, v_CKP))
            query_L1 = torch.arange(before + first, before + last, device=q_THP.device)[:, None]
            key_C = torch.arange(lowest, before + last, device=q_THP.device)
            mask_LC = (key_C <= query_L1) & (key_C > query_L1 - window)
            o = F.scaled_dot_product_attention(
                q_1HLP, k, v, attn_mask=mask_LC, enable_gqa=q_1HLP.shape[1] != k.shape[1]
            )
            outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


def _keys_of(
    k_TKP: Tensor, v_TKP: Tensor, layout: Layout, sequence: int, window: int, cache: RingCache | None
) -> tuple[Tensor, Tensor, int]:
    """One sequence's keys and values that its queries may see, and how many are from before this batch."""
    rows = slice(layout.starts[sequence], layout.starts[sequence + 1])
    k_CKP, v_CKP = k_TKP[rows], v_TKP[rows]
    position = layout.positions[sequence]
    before = min(position, window - 1)
    if cache is None or layout.slots is None or not before:
        return k_CKP, v_CKP, 0
    k_1BKP, v_1BKP, _ = cache.read([layout.slots[sequence]], [position], before)
    k_CKP, v_CKP = (torch.cat([old[0].to(new.dtype), new]) for old, new in ((k_1BKP, k_CKP), (v_1BKP, v_CKP)))
    return k_CKP, v_CKP, before


def _decode(
    q_ZHP: Tensor, k_ZKP: Tensor, v_ZKP: Tensor, layout: Layout, window: int, cache: RingCache
) -> Tensor:
    """One token of each sequence. The query heads of a key head become its rows, so keys are not repeated."""
    k_ZBKP, v_ZBKP, valid_ZB = cache.read(list(layout.slots or ()), list(layout.positions), window - 1)
    dtype = q_ZHP.dtype
    k, v = (
        torch.cat([old.to(dtype), new[:, None]], dim=1).transpose(1, 2)
        for old, new in ((k_ZBKP, k_ZKP), (v_ZBKP, v_ZKP))
    )
    mask_ZC = torch.cat([valid_ZB, valid_ZB.new_ones(len(valid_ZB), 1)], dim=1)
    q_ZKgP = q_ZHP.unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(q_ZKgP, k, v, attn_mask=mask_ZC[:, None, None, :]).flatten(1, 2)
