"""The torch form of ragged attention, with and without pages, against its equation one query at a time."""

import functools

import pytest
import torch
from torch import Tensor

from nanohybrid.ops.attention import PagedCache, pages, reference
from nanohybrid.ops.attention import torch as torch_form
from nanohybrid.ops.layout import Layout

HEADS = [(4, 2, 12), (3, 1, 5), (2, 2, 80)]  # query heads, key heads, head dimension
PAGES = 31


def inputs(layout: Layout, H: int, K: int, P: int) -> dict[str, Tensor]:
    T = layout.tokens
    return {"q_THP": torch.randn(T, H, P), "k_TKP": torch.randn(T, K, P), "v_TKP": torch.randn(T, K, P)}


def pools(layout: Layout, K: int, P: int, dtype: torch.dtype = torch.float64) -> PagedCache | None:
    """Pools with random numbers in every row, for a layout with pages."""
    if layout.pages is None:
        return None
    key, value = torch.randn(2, PAGES, layout.page_size, K, P, dtype=dtype)
    return PagedCache(key, value)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_equals_its_equation_in_float64(layout, heads):
    H, K, P = heads
    tensors = {name: t.double() for name, t in inputs(layout, H, K, P).items()}
    cache = pools(layout, K, P)
    copies = [None if cache is None else PagedCache(cache.key.clone(), cache.value.clone()) for _ in range(2)]
    fast = torch_form.attention(**tensors, layout=layout, cache=copies[0])
    expected = reference.attention(**tensors, layout=layout, cache=copies[1])
    torch.testing.assert_close(fast, expected, atol=1e-10, rtol=1e-10)
    if cache is not None:
        assert torch.equal(copies[0].key, copies[1].key) and torch.equal(copies[0].value, copies[1].value)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("lengths", [[1], [1, 2, 3, 5, 17], [127, 128, 129], [63, 300]], ids=str)
def test_attention_has_the_gradients_of_its_equation(lengths, dtype, tolerance, agree):
    layout = Layout.packed(lengths)
    fast, expected = (
        functools.partial(op, layout=layout) for op in (torch_form.attention, reference.attention)
    )
    agree(fast, expected, inputs(layout, *HEADS[0]), dtype, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_pages_equals_its_equation_in_fp32_and_bf16(layout, dtype):
    H, K, P = HEADS[0]
    tensors = {name: t.to(dtype) for name, t in inputs(layout, H, K, P).items()}
    cache = pools(layout, K, P, dtype)
    wide = None if cache is None else PagedCache(cache.key.double(), cache.value.double())
    fast = torch_form.attention(**tensors, layout=layout, cache=cache)
    expected = reference.attention(
        **{name: t.double() for name, t in tensors.items()}, layout=layout, cache=wide
    )
    assert fast.dtype == dtype
    torch.testing.assert_close(
        fast.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_attention_does_not_cross_document_boundaries(poison):
    layout = Layout.packed([7, 20, 5])
    tensors = inputs(layout, *HEADS[0])

    def run(rows: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in rows.items()}
        out = torch_form.attention(**leaves, layout=layout)[27:]
        out.sum().backward()
        return [out, *(leaf.grad[27:] for leaf in leaves.values())]

    dirty = {name: t.clone().index_fill(0, torch.arange(27), poison) for name, t in tensors.items()}
    for clean, after in zip(run(tensors), run(dirty), strict=True):
        assert torch.equal(clean, after)


def test_attention_does_not_read_pages_of_other_sequences_or_past_its_end():
    layout = Layout.with_cache([1, 3], [20, 4], [0, 1], [[3, 9], [5]], 16)
    tensors = inputs(layout, 2, 1, 4)
    cache = pools(layout, 1, 4, torch.float32)
    clean = torch_form.attention(
        **tensors, layout=layout, cache=PagedCache(cache.key.clone(), cache.value.clone())
    )
    for pool in (cache.key, cache.value):
        others = [page for page in range(PAGES) if page not in (3, 9, 5)]
        pool[others] = float("nan")
        pool[9, 5:] = 1e9  # past the end of the first sequence: finite, and masked
        pool[5, 7:] = 1e9
    assert torch.equal(torch_form.attention(**tensors, layout=layout, cache=cache), clean)


def test_pages_read_returns_a_view_of_evenly_spaced_runs_of_pages():
    pool = torch.randn(12, 4, 2, 3)
    layout = Layout.contiguous([1, 1, 1], [6, 5, 4], [0, 1, 2], 16, 4)
    view = pages.read(pool, layout, (0, 1, 2), 7)
    assert view.data_ptr() == pool.data_ptr()
    assert torch.equal(view, pool.view(3, 16, 2, 3)[:, :7])
    scattered = Layout.with_cache([1, 1], [6, 5], [0, 1], [[3, 1], [8, 2]], 4)
    assert torch.equal(pages.read(pool, scattered, (0, 1), 7)[0], torch.cat([pool[3], pool[1]])[:7])
