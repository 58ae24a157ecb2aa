"""The CPU's attention over pages against softmax in float64: blocks, tiles, rising maxima, processors without
AVX512-BF16.
"""

import numba
import numpy as np
import pytest
import torch

from nanohybrid.ops.numba import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.executors.cpu.kernels.attention import (
    BLOCK_ROWS,
    attention_block,
    attention_scratch,
    num_blocks,
)
from nanohybrid.executors.cpu.kernels.gemm_tile import make_tiles
from nanohybrid.executors.cpu.kernels.softmax import INITIAL_MAX, make_softmax
from nanohybrid.ops.numba.jit import FASTMATH
from nanohybrid.ops.sizes import PAGE

SIZES = {"groups of 4": (8, 2, 64), "a head of its own": (2, 2, 16), "groups of 5": (5, 1, 48)}
compiled = numba.njit(fastmath=FASTMATH, error_model="numpy")


@compiled
def all_blocks(count, position, projected, columns, sizes, memory, pages, scratch, packed):
    for item in range(num_blocks(count, sizes) * sizes[1]):
        block, head = item // sizes[1], item % sizes[1]
        attention_block(
            block,
            0,
            count,
            position,
            head,
            projected,
            columns,
            sizes,
            memory,
            np.float32(1e-5),
            pages,
            0,
            scratch,
            packed,
            1,
            sizes[0] * sizes[2],
        )


class Case:
    """Keys and values of `context` tokens in pages in random order, and queries of all of them."""

    def __init__(self, sizes, context, key_scale=None):
        queries, kv_heads, head_dim = self.sizes = sizes
        pages = -(-context // PAGE)
        self.q, self.k, self.v = (
            torch.randn(pages * PAGE, heads, head_dim).bfloat16() for heads in (queries, kv_heads, kv_heads)
        )
        if key_scale is not None:
            self.q[:], self.k = self.q[:1], (self.q[0, :1] * key_scale[:, None, None]).bfloat16() + self.k
        self.context, self.table = context, torch.randperm(pages).numpy()
        k, v = self.k.clone(), self.v.clone()
        k[context:], v[-(-context // 8) * 8 :] = float("nan"), float("nan")  # which must not be read
        v[context : -(-context // 8) * 8] = 0
        k = k.view(pages, PAGE // 16, 16, kv_heads, head_dim // 2, 2).permute(0, 3, 1, 4, 2, 5)
        v = v.view(pages, PAGE // 2, 2, kv_heads, head_dim // 16, 16).permute(0, 3, 4, 1, 5, 2)
        self.keys, self.values = (torch.empty_like(of).contiguous() for of in (k, v))
        self.keys[self.table], self.values[self.table] = k, v

    def attended(self, first, last):
        """Outputs [T, H, P] of the tokens `first` to `last`, by one call."""
        queries, kv_heads, head_dim = self.sizes
        columns, sizes = (queries + 2 * kv_heads) * head_dim, np.array(self.sizes)
        projected = torch.full((last - first, columns), float("nan"))
        projected[:, : queries * head_dim] = self.q[first:last].flatten(1)
        scratch = torch.full((attention_scratch.py_func(self.sizes) + 16,), float("nan"))
        scratch[-16:] = 7  # a canary
        out = torch.full((last - first, queries, head_dim), float("nan"), dtype=torch.bfloat16)
        memory = np.array([self.keys.data_ptr(), self.values.data_ptr(), 0, 0])
        args = (
            projected.data_ptr(),
            columns,
            sizes,
            memory,
            self.table.ctypes.data,
            scratch.data_ptr(),
            out.data_ptr(),
        )
        all_blocks(last - first, first, *args)
        assert (scratch[-16:] == 7).all()
        return out

    def expected(self):
        """Outputs of all tokens, in float64."""
        queries, kv_heads, head_dim = self.sizes
        q = self.q[: self.context].double()
        k, v = (
            of[: self.context].double().repeat_interleave(queries // kv_heads, dim=1)
            for of in (self.k, self.v)
        )
        scores = torch.einsum("thp,shp->hts", q, k) / head_dim**0.5
        scores.masked_fill_(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        return torch.einsum("hts,shp->thp", scores.softmax(-1), v)


def close(found, expected, tolerance=0.01):
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", SIZES)
def test_attention_block_equals_softmax_over_all_earlier_tokens(name):
    case = Case(SIZES[name], 301)
    close(case.attended(0, 301), case.expected())


@pytest.mark.parametrize("name", SIZES)
def test_attention_block_gives_a_token_the_same_bits_in_any_block(name):
    case = Case(SIZES[name], 301)
    whole = case.attended(0, 301)
    assert 301 * case.sizes[0] // case.sizes[1] > BLOCK_ROWS
    for first, last in ((0, 1), (1, 3), (100, 131), (127, 129), (255, 258), (120, 300), (300, 301)):
        assert torch.equal(case.attended(first, last), whole[first:last])


def test_attention_block_stays_accurate_while_the_maximum_rises_from_page_to_page():
    case = Case(SIZES["groups of 4"], 500, key_scale=torch.linspace(0.1, 12, 512))
    close(case.attended(0, 500), case.expected(), 0.02)


@pytest.mark.parametrize("bf16_instructions", [True, False] if make_softmax.__defaults__[0] else [False])
@pytest.mark.parametrize("seen", [128, 127, 33, 1, 0])
def test_softmax_probabilities_of_a_row_that_sees_part_of_a_page(bf16_instructions, seen):
    page, masked = make_softmax(bf16_instructions)

    @compiled
    def run(scores, out, scale, maximum, totals):
        if seen == PAGE:
            return page(scores, out, scale, maximum, totals)
        return masked(scores, out, scale, maximum, totals, seen, max(1, (seen + 15) // 16))

    scores, out = torch.randn(PAGE) * 20, torch.full((PAGE,), float("nan"), dtype=torch.bfloat16)
    scores[seen:] = float("nan")
    maximum, totals = torch.tensor([INITIAL_MAX if seen else 3.0]), torch.zeros(16)
    rescale = run(scores.data_ptr(), out.data_ptr(), np.float32(0.5), maximum.data_ptr(), totals.data_ptr())
    if not seen:  # nothing changes
        assert rescale == 1 and maximum[0] == 3 and not totals.any() and not out[:16].any()
        return
    expected = 2 ** (scores[:seen].double() * 0.5 - scores[:seen].max() * 0.5)
    assert maximum[0] == scores[:seen].max() * 0.5
    assert abs(totals.sum() / expected.sum() - 1) < 1e-5
    assert (
        torch.allclose(out[:seen].double(), expected, rtol=0.0041, atol=0)
        and not out[seen : -(-seen // 16) * 16].any()
    )


def test_softmax_rescales_earlier_sums_when_the_maximum_rises():
    page, _ = make_softmax()

    @compiled
    def run(scores, out, maximum, totals):
        return page(scores, out, np.float32(1), maximum, totals)

    pages = torch.randn(3, PAGE) + torch.tensor([[0.0], [9.0], [5.0]])
    out, maximum, totals = torch.empty(PAGE // 2), torch.tensor([INITIAL_MAX]), torch.zeros(16)
    rescales = [run(one.data_ptr(), out.data_ptr(), maximum.data_ptr(), totals.data_ptr()) for one in pages]
    tops = pages.max(1).values
    assert rescales[1] == pytest.approx(2.0 ** float(tops[0] - tops[1]), rel=1e-5) and rescales[2] == 1
    assert totals.sum() == pytest.approx(float((2 ** (pages - tops[1]).double()).sum()), rel=1e-5)


@pytest.mark.parametrize("bf16_instructions", [True, False] if make_tiles.__defaults__[0] else [False])
def test_tiles_with_a_row_stride_add_to_the_output(bf16_instructions):
    tiles = make_tiles([("bf16", 3, 2)], bf16_instructions=bf16_instructions, row_stride=256)

    @numba.njit
    def run(w, x, out):
        tiles(0, 3, 2, w, 16 * 64, 0, x, out, 128, 1, 16, 0)

    w, x, out = torch.randn(2, 16, 16, 2).bfloat16(), torch.randn(3, 128).bfloat16(), torch.randn(3, 32)
    expected = out + torch.einsum("rkt,pknt->rpn", x[:, :32].float().view(3, 16, 2), w.float()).flatten(1)
    run(w.data_ptr(), x.data_ptr(), out.data_ptr())
    assert torch.allclose(out, expected, atol=1e-4)
