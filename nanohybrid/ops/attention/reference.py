"""o_t = sum_{j <= t} softmax_j(q_t . k_j / sqrt(P)) v_j within each sequence, one query token at a time.

T tokens · H query heads · K key/value heads · P head dimension · C tokens of context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout

if TYPE_CHECKING:
    from nanohybrid.ops.attention.cache import PagedCache


def attention(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, cache: PagedCache | None = None
) -> Tensor:
    """o_THP in q's dtype; sums are fp32 (float64 for float64)."""
    dtype = torch.promote_types(q_THP.dtype, torch.float32)
    queries_per_key = q_THP.shape[1] // k_TKP.shape[1]
    if cache is not None:
        cache.write(k_TKP, v_TKP, layout)
    outputs = []
    for i, (start, length, position) in enumerate(
        zip(layout.starts, layout.lengths, layout.positions, strict=False)
    ):
        if cache is None:
            k_CKP, v_CKP = k_TKP[start : start + length], v_TKP[start : start + length]
        else:
            k_CKP, v_CKP = (rows_ZCKP[0] for rows_ZCKP in cache.read(layout, (i,), position + length))
        k_CHP = k_CKP.to(dtype).repeat_interleave(queries_per_key, dim=1)
        v_CHP = v_CKP.to(dtype).repeat_interleave(queries_per_key, dim=1)
        for t in range(length):
            visible = position + t + 1
            scores_HC = (
                torch.einsum("HP,CHP->HC", q_THP[start + t].to(dtype), k_CHP[:visible])
                * q_THP.shape[2] ** -0.5
            )
            outputs.append(torch.einsum("HC,CHP->HP", scores_HC.softmax(-1), v_CHP[:visible]))
    return torch.stack(outputs).to(q_THP.dtype)
