"""Ragged attention by torch's scaled_dot_product_attention, which never stores the score matrix.

There are three cases: a sequence begins in this batch (all its keys are in the batch), decodes one token, or
continues with several tokens. A mixed batch is split into the three.

T tokens · Z sequences side by side · L padded length · C context · H query heads · K key/value heads · P head
dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanohybrid.ops.layout import Layout

if TYPE_CHECKING:
    from nanohybrid.ops.attention.cache import PagedCache

QUERY_TILE = 256  # queries of a continuation that share one mask, at most [256, context] booleans
# Up to this length the gradient on a CPU is about three times faster in fp32 than in bf16 (docs/ops.md).
SHORT = 256


def attention(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, cache: PagedCache | None = None
) -> Tensor:
    """o_THP in q's dtype."""
    if cache is None:
        return _begin(q_THP, k_TKP, v_TKP, layout)
    cache.write(k_TKP, v_TKP, layout)
    if not layout.continues:
        return _begin(q_THP, k_TKP, v_TKP, layout)
    if layout.is_decode and len(layout.continues) == layout.sequences:
        return _decode(q_THP, layout, cache, layout.continues)
    o_THP = torch.empty_like(q_THP)
    fresh = [i for i in range(layout.sequences) if not layout.positions[i]]
    if fresh:
        rows = _rows(layout, fresh, q_THP.device)
        part = Layout.packed([layout.lengths[i] for i in fresh])
        o_THP[rows] = _begin(q_THP[rows], k_TKP[rows], v_TKP[rows], part)
    single = tuple(i for i in layout.continues if layout.lengths[i] == 1)
    if single:
        rows = _rows(layout, single, q_THP.device)
        o_THP[rows] = _decode(q_THP[rows], layout, cache, single)
    for i in layout.continues:
        if layout.lengths[i] > 1:
            span = slice(layout.starts[i], layout.starts[i + 1])
            o_THP[span] = _continue(q_THP[span], layout, cache, i)
    return o_THP


def _rows(layout: Layout, sequences: list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(
        np.concatenate([np.arange(layout.starts[i], layout.starts[i + 1]) for i in sequences])
    ).to(device)


def _begin(q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout) -> Tensor:
    """Sequences all of whose keys are in this batch.

    The padding is at the end, where the causal mask hides it.
    """
    plan = layout.plan(None)
    outputs = []
    for q_ZLHP, k_ZLKP, v_ZLKP in zip(plan.split(q_THP), plan.split(k_TKP), plan.split(v_TKP), strict=True):
        q, k, v = (x.transpose(1, 2) for x in (q_ZLHP, k_ZLKP, v_ZLKP))
        if q.requires_grad and q.device.type == "cpu" and q.shape[2] <= SHORT:
            q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            o_ZHLP = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(o_ZHLP.transpose(1, 2).to(q_THP.dtype))
    return plan.join(outputs)


def _decode(q_ZHP: Tensor, layout: Layout, cache: PagedCache, sequences: tuple[int, ...]) -> Tensor:
    """One token of each sequence.

    The query heads of a key head become its rows, so keys are read once and never repeated.
    """
    lengths = [layout.positions[i] + 1 for i in sequences]
    context = max(lengths)
    k_ZCKP, v_ZCKP = cache.read(layout, sequences, context)
    mask = None
    if min(lengths) < context:
        ends = torch.tensor(lengths, device=q_ZHP.device)
        mask = (torch.arange(context, device=q_ZHP.device) < ends[:, None])[:, None, None, :]
    q_ZKgP = q_ZHP.unflatten(1, (k_ZCKP.shape[2], -1))
    k, v = (x.transpose(1, 2).to(q_ZHP.dtype) for x in (k_ZCKP, v_ZCKP))
    return F.scaled_dot_product_attention(q_ZKgP, k, v, attn_mask=mask).flatten(1, 2)


def _continue(q_LHP: Tensor, layout: Layout, cache: PagedCache, sequence: int) -> Tensor:
    """Several tokens of one sequence against all tokens in its pages, one tile of queries at a time."""
    position, length = layout.positions[sequence], len(q_LHP)
    k, v = (
        rows_ZCKP.transpose(1, 2).to(q_LHP.dtype)
        for rows_ZCKP in cache.read(layout, (sequence,), position + length)
    )
    outputs = []
    for first in range(0, length, QUERY_TILE):
        q = q_LHP[first : first + QUERY_TILE].transpose(0, 1)[None]
        visible = torch.arange(position + first, position + first + q.shape[2], device=q.device)
        context = position + first + q.shape[2]
        mask = torch.arange(context, device=q.device) <= visible[:, None]
        o = F.scaled_dot_product_attention(
            q, k[:, :, :context], v[:, :, :context], attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)
