"""Sliding-window attention: the torch form against the equation, with rings that wrap, and in FP8."""

import pytest
import torch

from nanohybrid.ops.attention import RingCache, window_attention
from nanohybrid.ops.layout import Layout

SHAPES = [(4, 2, 6), (3, 3, 7), (5, 1, 16)]  # query heads, key heads, head dimension


def rows(layout, H, K, P, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layout.tokens, heads, P, generator=generator, dtype=dtype) for heads in (H, K, K)]


def banded(q_THP, k_TKP, v_TKP, lengths, window):
    """Softmax over an explicit mask of each document."""
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length] for x in (q_THP, k_TKP, v_TKP))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        t = torch.arange(length)
        mask = (t[None] <= t[:, None]) & (t[None] > t[:, None] - window)
        scores = torch.einsum("THP,CHP->HTC", q, k) * q.shape[2] ** -0.5
        outputs.append(torch.einsum("HTC,CHP->THP", scores.masked_fill(~mask, float("-inf")).softmax(-1), v))
        start += length
    return torch.cat(outputs)


def ring(slots, size, K, P, dtype=torch.float64):
    """A ring full of NaN: nothing unwritten may be read."""
    return RingCache(*(torch.full((slots, size, K, P), float("nan"), dtype=dtype) for _ in range(2)))


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [1, 5, 300])
def test_window_attention_of_packed_documents_equals_a_band_mask(form, shape, window, monkeypatch):
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    layout = Layout.packed([1, 40, 270 if form == "torch" else 20])
    q, k, v = rows(layout, *shape)
    expected = banded(q, k, v, layout.lengths, window)
    torch.testing.assert_close(window_attention(q, k, v, layout, window), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_window_attention_gradients_equal_those_of_a_band_mask(name):
    layout = Layout.packed([20, 7])
    tensors = dict(zip("qkv", rows(layout, 4, 2, 6), strict=True))
    gradients = []
    for function in (
        lambda q, k, v: window_attention(q, k, v, layout, 4),
        lambda q, k, v: banded(q, k, v, layout.lengths, 4),
    ):
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
        function(**leaves).square().sum().backward()
        gradients.append(leaves[name].grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("size", [6, 9, 64])
def test_window_attention_over_a_ring_equals_the_whole_text(form, size, monkeypatch):
    """Two sequences in slots out of order, in prefills, continuations and steps, past the end of the ring."""
    monkeypatch.setenv("NANOHYBRID_KERNELS", form)
    window, lengths, slots = 6, (30, 17), (2, 0)
    whole = Layout.packed(lengths)
    q, k, v = rows(whole, 4, 2, 6)
    expected = banded(q, k, v, lengths, window)
    cache, found = ring(3, size, 2, 6), [[], []]
    read = [0, 0]
    for target in ((4, 1), (5, 2), (16, 10), (17, 11), (30, 17)):
        parts = [range(read[i], target[i]) for i in range(2)]
        layout = Layout.contiguous([len(part) for part in parts], read, slots, 64, 16)
        index = torch.cat([whole.starts[i] + torch.tensor(list(parts[i])) for i in range(2)])
        out = window_attention(q[index], k[index], v[index], layout, window, cache)
        for i, rows_THP in enumerate(out.split([len(part) for part in parts])):
            found[i].append(rows_THP)
        read = list(target)
    joined = torch.cat([part for parts in found for part in parts])
    torch.testing.assert_close(joined, expected, rtol=1e-9, atol=1e-9)


def test_window_attention_overwrites_rejected_draft_tokens_in_its_ring():
    """A ring longer than the window by the number of draft tokens: what is rejected is never read."""
    window, drafts = 5, 4
    layout = Layout.packed([24])
    q, k, v = rows(layout, 4, 2, 6)
    cache = ring(1, window + drafts, 2, 6)
    window_attention(q[:20], k[:20], v[:20], Layout.contiguous([20], [0], [0], 64, 16), window, cache)
    wrong = torch.full((drafts, 2, 6), 1e3, dtype=torch.float64)
    ahead = Layout.contiguous([drafts], [20], [0], 64, 16)
    window_attention(q[20:24], wrong, wrong, ahead, window, cache)
    expected = banded(q, k, v, [24], window)[20:]
    for step in range(4):
        at = slice(20 + step, 21 + step)
        one = Layout.contiguous([1], [20 + step], [0], 64, 16)
        found = window_attention(q[at], k[at], v[at], one, window, cache)
        torch.testing.assert_close(found, expected[step : step + 1], rtol=1e-9, atol=1e-9)


def test_window_attention_over_an_fp8_ring_is_within_its_rounding():
    window, K, P = 6, 2, 16
    layout = Layout.packed([20])
    q, k, v = rows(layout, 4, K, P, dtype=torch.float32)
    codes = [torch.zeros(1, 12, K, P).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = [torch.zeros(1, 12, K, dtype=torch.bfloat16) for _ in range(2)]
    cache = RingCache(*codes, *scales)
    window_attention(q[:19], k[:19], v[:19], Layout.contiguous([19], [0], [0], 64, 16), window, cache)
    found = window_attention(q[19:], k[19:], v[19:], Layout.contiguous([1], [19], [0], 64, 16), window, cache)
    expected = banded(q, k, v, [20], window)[19:]
    assert (found - expected).abs().max() < 0.06 * expected.abs().max()
