"""Frequencies and factors of rotary positions are transformers', to the last bit, for each scaling."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanohybrid.model.mixers.rope import RopeScaling, inverse_frequencies

LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(original_max_position_embeddings=32_768)
CASES = {
    "linear": (128, 1e4, dict(rope_type="linear", factor=2.0)),
    "linear, a fraction": (64, 1e4, dict(rope_type="linear", factor=1.5)),
    "Llama 3.1": (128, 5e5, dict(rope_type="llama3", factor=8.0, **LLAMA3)),
    "Llama 3.2 1B": (64, 5e5, dict(rope_type="llama3", factor=32.0, **LLAMA3)),
    "all waves short": (16, 1.5, dict(rope_type="llama3", factor=8.0, **LLAMA3)),
    "Qwen3": (128, 1e6, dict(rope_type="yarn", factor=4.0, **YARN)),
    "yarn, own attention factor": (
        64, 1e4, dict(rope_type="yarn", factor=16.0, attention_factor=1.25, **YARN),
    ),
    "yarn, two mscales": (
        64, 1e4, dict(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.707, **YARN),
    ),
    "yarn, own bounds, not rounded": (
        96, 15e4, dict(rope_type="yarn", factor=32.0, beta_fast=24.0, beta_slow=2.0, truncate=False, **YARN),
    ),
    "yarn, a narrow head": (8, 1e4, dict(rope_type="yarn", factor=2.0, **YARN)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factor_equal_transformers(name, transformers_config):
    head_dim, theta, values = CASES[name]
    config = transformers_config(head_dim, {**values, "rope_theta": theta})
    want, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, torch.device("cpu"))
    scaling = RopeScaling.of(values)
    assert torch.equal(inverse_frequencies(head_dim, theta, scaling), want)
    assert scaling.attention_scale == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 777.0])
def test_frequencies_without_scaling_equal_transformers(theta, transformers_config):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers_config(128, {"rope_type": "default", "rope_theta": theta})
    assert torch.equal(inverse_frequencies(128, theta), LlamaRotaryEmbedding(config).inv_freq)
