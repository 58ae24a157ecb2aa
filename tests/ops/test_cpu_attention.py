"""The CPU's attention over pages against softmax in float64: blocks, tiles, rising maxima, the plain instructions of other processors."""

import numba
import numpy as np
import pytest
import torch

from nanohybrid.ops.numba import available

if not available():
    pytest.skip("numba is not installed", allow_module_level=True)

from nanohybrid.executors.cpu.kernels.attention import BLOCK, attend, attention_room, blocks_of
from nanohybrid.executors.cpu.kernels.gemm_tile import make_tiles
from nanohybrid.executors.cpu.kernels.softmax import LEAST, make_softmax
from nanohybrid.ops.numba.jit import FASTMATH
from nanohybrid.ops.sizes import PAGE

SIZES = {"groups of 4": (8, 2, 64), "a head of its own": (2, 2, 16), "groups of 5": (5, 1, 48)}
compiled = numba.njit(fastmath=FASTMATH, error_model="numpy")


@compiled
def all_blocks(count, position, projected, columns, sizes, at, pages, room, packed):
    for item in range(blocks_of(count, sizes) * sizes[1]):
        block, head = item // sizes[1], item % sizes[1]
        attend(
            block,
            0,
            count,
            position,
            head,
            projected,
            columns,
            sizes,
            at,
            np.float32(1e-5),
            pages,
            0,
            room,
            packed,
            1,
            sizes[0] * sizes[2],
        )


class Case:
    """Keys and values of `context` tokens in pages that lie in no order, and queries of all of them."""

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
        k[context:], v[-(-context // 8) * 8 :] = float("nan"), float("nan")  # what nothing may look at
        v[context : -(-context // 8) * 8] = 0
        k = k.view(pages, PAGE // 16, 16, kv_heads, head_dim // 2, 2).permute(0, 3, 1, 4, 2, 5)
        v = v.view(pages, PAGE // 2, 2, kv_heads, head_dim // 16, 16).permute(0, 3, 4, 1, 5, 2)
        self.keys, self.values = (torch.empty_like(of).contiguous() for of in (k, v))
        self.keys[self.table], self.values[self.table] = k, v

    def attended(self, first, last):
        """Outputs of the tokens `first` to `last` [T, H, P] by one call."""
        queries, kv_heads, head_dim = self.sizes
        columns, sizes = (queries + 2 * kv_heads) * head_dim, np.array(self.sizes)
        projected = torch.full((last - first, columns), float("nan"))
        projected[:, : queries * head_dim] = self.q[first:last].flatten(1)
        room = torch.full((attention_room.py_func(self.sizes) + 16,), float("nan"))
        room[-16:] = 7  # the fence
        out = torch.full((last - first, queries, head_dim), float("nan"), dtype=torch.bfloat16)
        at = np.array([self.keys.data_ptr(), self.values.data_ptr(), 0, 0])
        where = (
            projected.data_ptr(),
            columns,
            sizes,
            at,
            self.table.ctypes.data,
            room.data_ptr(),
            out.data_ptr(),
        )
        all_blocks(last - first, first, *where)
        assert (room[-16:] == 7).all()
        return out

    def expected(self):
        """The same of all tokens, in float64."""
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
def test_it_is_softmax_over_all_that_a_token_may_see(name):
    case = Case(SIZES[name], 301)
    close(case.attended(0, 301), case.expected())


@pytest.mark.parametrize("name", SIZES)
def test_a_token_s_bits_are_the_same_in_any_block(name):
    case = Case(SIZES[name], 301)
    whole = case.attended(0, 301)
    assert 301 * case.sizes[0] // case.sizes[1] > BLOCK
    for first, last in ((0, 1), (1, 3), (100, 131), (127, 129), (255, 258), (120, 300), (300, 301)):
        assert torch.equal(case.attended(first, last), whole[first:last])


def test_a_maximum_that_rises_from_page_to_page_loses_nothing():
    case = Case(SIZES["groups of 4"], 500, key_scale=torch.linspace(0.1, 12, 512))
    close(case.attended(0, 500), case.expected(), 0.02)


@pytest.mark.parametrize("paired", [True, False] if make_softmax.__defaults__[0] else [False])
@pytest.mark.parametrize("seen", [128, 127, 33, 1, 0])
def test_probabilities_of_a_row(paired, seen):
    whole, partial = make_softmax(paired)

    @compiled
    def run(scores, out, scale, most, weights):
        if seen == PAGE:
            return whole(scores, out, scale, most, weights)
        return partial(scores, out, scale, most, weights, seen, max(1, (seen + 15) // 16))

    scores, out = torch.randn(PAGE) * 20, torch.full((PAGE,), float("nan"), dtype=torch.bfloat16)
    scores[seen:] = float("nan")
    most, weights = torch.tensor([LEAST if seen else 3.0]), torch.zeros(16)
    shrink = run(scores.data_ptr(), out.data_ptr(), np.float32(0.5), most.data_ptr(), weights.data_ptr())
    if not seen:  # all as before
        assert shrink == 1 and most[0] == 3 and not weights.any() and not out[:16].any()
        return
    expected = 2 ** (scores[:seen].double() * 0.5 - scores[:seen].max() * 0.5)
    assert most[0] == scores[:seen].max() * 0.5
    assert abs(weights.sum() / expected.sum() - 1) < 1e-5
    assert (
        torch.allclose(out[:seen].double(), expected, rtol=0.0041, atol=0)
        and not out[seen : -(-seen // 16) * 16].any()
    )


def test_a_later_page_makes_up_for_its_larger_maximum():
    whole, _ = make_softmax()

    @compiled
    def run(scores, out, most, weights):
        return whole(scores, out, np.float32(1), most, weights)

    pages = torch.randn(3, PAGE) + torch.tensor([[0.0], [9.0], [5.0]])
    out, most, weights = torch.empty(PAGE // 2), torch.tensor([LEAST]), torch.zeros(16)
    shrinks = [run(page.data_ptr(), out.data_ptr(), most.data_ptr(), weights.data_ptr()) for page in pages]
    tops = pages.max(1).values
    assert shrinks[1] == pytest.approx(2.0 ** float(tops[0] - tops[1]), rel=1e-5) and shrinks[2] == 1
    assert weights.sum() == pytest.approx(float((2 ** (pages - tops[1]).double()).sum()), rel=1e-5)


@pytest.mark.parametrize("paired", [True, False] if make_tiles.__defaults__[0] else [False])
def test_tiles_of_rows_that_lie_apart_go_on_from_what_is_there(paired):
    tiles = make_tiles([("bf16", 3, 2)], paired=paired, apart=256)

    @numba.njit
    def run(w, x, out):
        tiles(0, 3, 2, w, 16 * 64, 0, x, out, 128, 1, 16, 0)

    w, x, out = torch.randn(2, 16, 16, 2).bfloat16(), torch.randn(3, 128).bfloat16(), torch.randn(3, 32)
    expected = out + torch.einsum("rkt,pknt->rpn", x[:, :32].float().view(3, 16, 2), w.float()).flatten(1)
    run(w.data_ptr(), x.data_ptr(), out.data_ptr())
    assert torch.allclose(out, expected, atol=1e-4)
