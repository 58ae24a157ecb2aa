"""Causal grouped-query attention over a ragged batch, with keys and values in pages."""

from torch import Tensor

from nanohybrid.ops.attention import reference
from nanohybrid.ops.attention import torch as torch_form
from nanohybrid.ops.attention.cache import PagedCache
from nanohybrid.ops.attention.window import RingCache, window_attention
from nanohybrid.ops.dispatch import Kernel, choose
from nanohybrid.ops.layout import Layout

TRITON = Kernel("nanohybrid.ops.attention.triton:attention")


__all__ = ["PagedCache", "RingCache", "attention", "window_attention"]


def attention(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, layout: Layout, cache: PagedCache | None = None
) -> Tensor:
    """o_THP: each token attends to itself and to the earlier tokens of its own sequence; scale P^-0.5.

    With a cache, keys and values are first written to the layout's pages, and a sequence that continues
    attends to all tokens in its pages. Query head h reads key head h // (H // K).
    """
    triton = (
        None if cache is not None and cache.quantized else TRITON
    )  # the Triton kernels cannot read FP8 pages
    form = choose(
        q_THP, k_TKP, v_TKP, reference=reference.attention, torch=torch_form.attention, triton=triton
    )
    o_THP: Tensor = form(q_THP, k_TKP, v_TKP, layout, cache)
    return o_THP
