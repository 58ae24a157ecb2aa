"""Models and a tokenizer for the engine's tests; helpers are in engine_helpers.py."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from nanohybrid.text import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of 13 special tokens and the 256 bytes."""
    special_tokens = ["<unk>", "<s>", "</s>"] + [f"<SPECIAL_{i}>" for i in range(3, 13)]
    vocabulary = {token: i for i, token in enumerate(special_tokens)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return Tokenizer(raw)


def small(dtype: torch.dtype, head_dim: int):
    """A small model with layers of every kind, whose logits are so far apart that rounding changes no argmax.

    head_dim: 16 for the CPU kernels.
    """
    from nanohybrid.config import HybridConfig
    from nanohybrid.engine.random_weights import random_model

    config = HybridConfig(
        pattern="M-*M-",
        vocab_size=269,
        hidden_size=48,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        mamba_num_heads=4,
        mamba_head_dim=20,
        n_groups=2,
        ssm_state_size=16,
        initializer_range=0.3,
    )
    return random_model(config, dtype, seed=5)


@pytest.fixture(scope="session")
def model():
    return small(torch.float32, head_dim=12)


@pytest.fixture(scope="session")
def packed():
    """A similar model in bf16, packed for the CPU kernels; skips where they cannot be used."""
    from nanohybrid.executors.cpu.weights import prepare

    model = small(torch.bfloat16, head_dim=16)
    if not prepare(model):
        pytest.skip("the CPU's kernels cannot be used here")
    return model
