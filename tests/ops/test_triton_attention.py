"""Paged attention's Triton kernels against the equation in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from nanohybrid.ops.attention import PagedCache, reference
from nanohybrid.ops.attention.triton import attention, decode_attention
from nanohybrid.ops.layout import Layout

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
PAGES = 40
STORED = {
    "decode": Layout.with_cache(
        [1, 1, 1], [5, 127, 300], [0, 1, 2], [[33], range(10, 18), [*range(9, -1, -1), *range(18, 28)]], 16
    ),
    "decode that begins": Layout.with_cache([1, 1], [0, 63], [1, 0], [[7], [4, 2, 9, 8]], 16),
    "continuations": Layout.with_cache([5, 70, 1], [12, 66, 9], [3, 0, 2], [[5, 3], range(10, 20), [30]], 16),
    "mixed, page 32": Layout.with_cache(
        [17, 1, 40], [0, 77, 1], [4, 0, 2], [[0], range(10, 13), [20, 22]], 32
    ),
}


def inputs(
    layout: Layout, H: int, K: int, P: int, pages: int, dtype: torch.dtype
) -> tuple[list[Tensor], PagedCache]:
    """q, k and v, and pools with NaN wherever no sequence of the layout has a token before this batch."""
    rows = [torch.randn(layout.tokens, heads, P).to(dtype) for heads in (H, K, K)]
    pools = torch.full((2, pages, layout.page_size, K, P), float("nan"))
    for owned, position in zip(layout.pages, layout.positions, strict=True):
        for j in range(position):
            pools[:, owned[j // layout.page_size], j % layout.page_size] = torch.randn(2, K, P)
    key, value = pools.to(dtype)
    return rows, PagedCache(key, value)


def check(
    layout: Layout, H: int, K: int, P: int, dtype: torch.dtype, chip: torch.device, close, pages: int = PAGES
) -> None:
    rows, cache = inputs(layout, H, K, P, pages, dtype)
    expected = reference.attention(
        *(row.double() for row in rows), layout, PagedCache(cache.key.double(), cache.value.double())
    )
    found = attention(
        *(row.to(chip) for row in rows), layout, PagedCache(cache.key.to(chip), cache.value.to(chip))
    )
    assert found.dtype == dtype
    close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [(5, 1, 12), (4, 2, 16)], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_triton_attention_equals_its_equation_and_reads_only_its_pages(name, heads, chip, close):
    check(STORED[name], *heads, torch.float32, chip, close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["decode", "mixed, page 32"])
def test_triton_attention_equals_its_equation_in_fp16_and_bf16(name, dtype, chip, close):
    check(STORED[name], 10, 2, 20, dtype, chip, close)


def test_triton_decode_attention_has_the_same_bits_alone_and_in_a_batch(chip):
    layout = STORED["decode"]
    rows, cache = inputs(layout, 5, 1, 16, PAGES, torch.float32)
    on_chip = PagedCache(cache.key.to(chip), cache.value.to(chip))
    together = attention(*(row.to(chip) for row in rows), layout, on_chip)
    for i in range(layout.sequences):
        alone = Layout.with_cache([1], [layout.positions[i]], [0], [layout.pages[i]], 16)
        assert torch.equal(decode_attention(rows[0][i : i + 1].to(chip), alone, on_chip)[0], together[i])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads", [(40, 8, 128), (32, 8, 64), (16, 16, 80), (8, 1, 256), (20, 4, 96)], ids=str
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("page_size", [16, 128])
def test_triton_attention_on_a_gpu(page_size, dtype, heads, chip, close):
    n = 4096 // page_size
    own = [range(i * n, (i + 1) * n) for i in range(4)]
    for lengths, positions in (
        ((1,) * 4, (0, 63, 1024, 4095)),
        ((1, 150, 64, 130), (4000, 0, 100, 2000)),
        ((300,), (1500,)),
    ):
        check(
            Layout.with_cache(lengths, positions, range(len(lengths)), own[: len(lengths)], page_size),
            *heads,
            dtype,
            chip,
            close,
            4 * n,
        )
