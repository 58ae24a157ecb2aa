"""The values of every type of block against the gguf package's, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from nanohybrid.gguf.blocks import values
from nanohybrid.gguf.kinds import FLOATS, KINDS, OTHERS

BLOCKS = 513


def same_bits(found, wanted):
    """Whether fp32 arrays are equal, bit for bit where they are numbers."""
    numbers = ~np.isnan(wanted)
    return np.array_equal(np.isnan(found), ~numbers) and np.array_equal(
        found.view(np.uint32)[numbers], wanted.view(np.uint32)[numbers]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_have_the_values_of_the_gguf_package(kind):
    raw = np.random.default_rng(0).integers(0, 256, BLOCKS * KINDS[kind].bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw.reshape(BLOCKS, -1), gguf.GGMLQuantizationType[kind]).reshape(-1)
    found = values(torch.from_numpy(raw), kind)
    assert same_bits(found.float().numpy(), wanted)
    assert len(found) == BLOCKS * KINDS[kind].weights


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_that_the_gguf_package_quantized_are_near_the_weights(kind):
    weights = torch.randn(64, 512)
    raw = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType[kind])
    found = values(torch.from_numpy(raw).flatten(), kind).view(64, 512)
    assert (found - weights).norm() / weights.norm() < (0.01 if kind == "Q8_0" else 0.1)


def test_sizes_and_numbers_of_the_types_are_those_of_the_gguf_package():
    for kind, (number, weights, bytes_) in KINDS.items():
        known = gguf.GGMLQuantizationType[kind]
        assert (known.value, gguf.GGML_QUANT_SIZES[known]) == (number, (weights, bytes_))
    named = {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.name not in KINDS}
    assert {number: OTHERS.get(number) for number in named} == named


def test_floats_keep_their_type():
    for kind in FLOATS:
        assert values(torch.zeros(8, dtype=torch.uint8), kind).dtype != torch.uint8
