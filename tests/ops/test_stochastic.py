"""Stochastic rounding to fp16: unbiased, the same bits in both forms, determined by seed, position and
layer.
"""

import numpy as np
import pytest
import torch

from nanohybrid.ops.stochastic import keys
from nanohybrid.ops.stochastic import numba as numba_form
from nanohybrid.ops.stochastic import torch as torch_form

FORMS = [torch_form.to_half, numba_form.to_half]


def many(count, position=7):
    return torch.from_numpy(
        keys(np.arange(count, dtype=np.uint64), np.full(count, position, dtype=np.uint64))
    )


def spread(count=3000):
    """Numbers of both signs, from far below fp16's smallest step to beyond its largest number."""
    return torch.randn(count) * torch.logspace(-12, 6, count)


def neighbors(x):
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float16)
        down = np.where(nearest.astype(np.float64) <= x, nearest, np.nextafter(nearest, np.float16(-np.inf)))
        up = np.where(nearest.astype(np.float64) >= x, nearest, np.nextafter(nearest, np.float16(np.inf)))
    return down, up


@pytest.mark.parametrize("form", FORMS)
def test_to_half_rounds_to_a_neighbor_with_the_probability_that_preserves_the_mean(form):
    x = spread().clamp(-65504, 65504)
    drawn = form(x.expand(800, -1).contiguous(), many(800), 3).numpy()
    down, up = neighbors(x.double().numpy())
    assert ((drawn == down) | (drawn == up)).all()
    step = up.astype(np.float64) - down.astype(np.float64)
    wanted = np.where(step > 0, (x.double().numpy() - down) / np.maximum(step, 1e-30), 1.0)
    found = (drawn == up).mean(0)
    assert abs((found - wanted).mean()) < 2e-3 and np.abs(found - wanted).max() < 6 * 0.5 / 800**0.5


def test_to_half_has_the_same_bits_in_both_forms():
    edges = [
        0.0,
        -0.0,
        65504.0,
        65519.9,
        1e30,
        -1e30,
        2.0**-14,
        2.0**-24,
        2.0**-25,
        2.0**-38,
        2.0**-39,
        1e-40,
    ]
    x = torch.cat([spread(), torch.tensor(edges)])
    x = (
        torch.cat([x, 2.0**-14 - torch.arange(64) * 2.0**-38, torch.tensor([float("nan")])])
        .expand(20, -1)
        .contiguous()
    )
    for position in (0, 1, 2**40):
        first, second = (form(x, many(20, position), 5) for form in FORMS)
        assert torch.equal(first[:, :-1].view(torch.int16), second[:, :-1].view(torch.int16))
        assert first[:, -1].isnan().all() and second[:, -1].isnan().all()


def test_to_half_does_not_change_representable_numbers():
    x = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    x = x[x.isfinite()].float()
    for form in FORMS:
        assert torch.equal(form(x[None], many(1), 0)[0].float(), x)


def test_to_half_bits_depend_on_seed_position_and_layer_only():
    x = torch.full((4, 5000), 1 + 2.0**-11)

    def draw(seeds, positions, layer):
        return torch_form.to_half(x, torch.from_numpy(keys(seeds, positions)), layer)

    seeds, positions = np.array([1, 2, 1, 2], dtype=np.uint64), np.array([5, 5, 6, 5], dtype=np.uint64)
    bits = draw(seeds, positions, 1)
    assert torch.equal(bits[1], bits[3])
    up = bits[:3] > 1
    for one, other in ((up[0], up[1]), (up[0], up[2]), (up[0], draw(seeds, positions, 2)[0] > 1)):
        assert 0.45 < (one == other).float().mean() < 0.55
    assert 0.47 < up.float().mean() < 0.53


def test_keys_equal_splitmix64():
    def mix(word):
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, position in ((0, 0), (2**64 - 1, 3), (12345, 2**33)):
        wanted = mix((mix((seed + golden) % 2**64) + position * golden) % 2**64) >> 32
        assert (
            int(keys(np.array([seed], np.uint64), np.array([position], np.uint64)).view(np.uint32)[0])
            == wanted
        )
