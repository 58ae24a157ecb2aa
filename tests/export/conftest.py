"""Small models of every shape that llama.cpp knows, saved with a tokenizer."""

import pytest

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, train_bpe

HYBRID = dict(
    pattern="M-M*-M", vocab_size=384, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=32, n_groups=2, ssm_state_size=16,
    initializer_range=0.2, max_position_embeddings=512,
)  # fmt: skip
DENSE = dict(
    HYBRID, pattern="*-*-", rope_theta=5000.0, qk_norm=True, mlp_activation="swiglu", layer_norm_epsilon=1e-6
)
LLAMA = {**DENSE, "qk_norm": False, "layer_norm_epsilon": 1e-5}
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
CONFIGS = {
    "hybrid": HybridConfig(**HYBRID),
    "hybrid, tied": HybridConfig(**HYBRID, tie_word_embeddings=True),
    "one group": HybridConfig(**{**HYBRID, "n_groups": 1, "ssm_state_size": 128}),
    "a group a head, widths of the 9B": HybridConfig(
        **{**HYBRID, "n_groups": 4, "mamba_head_dim": 80, "ssm_state_size": 128}
    ),
    "attention first and last": HybridConfig(
        **{**HYBRID, "pattern": "*M--M*", "num_key_value_heads": 4, "head_dim": 32}
    ),
    "wide conv, odd sizes": HybridConfig(
        **{**HYBRID, "conv_kernel": 3, "mamba_head_dim": 24, "intermediate_size": 100}
    ),
    "no MLP": HybridConfig(**{**HYBRID, "pattern": "M*M"}),
    "dense": HybridConfig(**DENSE),
    "dense, tied": HybridConfig(
        **{**DENSE, "num_key_value_heads": 1, "head_dim": 32}, tie_word_embeddings=True
    ),
    "dense, yarn": HybridConfig(**DENSE, rope_scaling=YARN),
    "llama": HybridConfig(**LLAMA),
    "llama, tied, one key head": HybridConfig(
        **{**LLAMA, "num_key_value_heads": 1, "head_dim": 32}, tie_word_embeddings=True
    ),
    "llama 3": HybridConfig(**LLAMA, rope_scaling=LLAMA3),
    "llama, linear": HybridConfig(**LLAMA, rope_scaling=dict(rope_type="linear", factor=3.0)),
    "llama, yarn": HybridConfig(**LLAMA, rope_scaling=YARN),
    "mistral, heads beside the hidden size": HybridConfig(
        **{**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 5}
    ),
}
SAMPLE = """The quick brown fox counts 1, 2, 3 and 12 + 30 = 42. It's the quick brown fox's, isn't it?
def step(state, x):
    return state * 0.5 + x  # user: System, User, Assistant, think, no_think
Größe, naïve, 東京は日本の首都です, привет мир, مرحبا, 🙂🙂
"""


@pytest.fixture(scope="session")
def small():
    """A BPE of 350 ids."""
    return train_bpe([SAMPLE] * 4, 350)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, small):
    """Makes the checkpoint of a configuration by name, with tokenizer and template; each once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = directory = tmp_path_factory.mktemp("model") / "checkpoint"
            save(random_model(CONFIGS[name]), directory)
            small.save(directory)
            ChatTemplate.default().save(directory)
        return made[name]

    return make


def random_model(config):
    """Random weights; the vectors that begin as ones or zeros are random too, or an exchanged pair of them
    would not show."""
    model = HybridLM(config, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
            parameter.data.add_(0.2 * parameter.data.clone().normal_())
    return model
