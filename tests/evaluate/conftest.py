"""A tiny random checkpoint with its tokenizer, made once."""

import pytest

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, train_bpe

SMALL = dict(
    vocab_size=269, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    train_bpe(["some words"], 269).save(folder)
    ChatTemplate.default().save(folder)
    save(HybridLM(HybridConfig(pattern="M-*-", **SMALL), seed=0), folder)
    return folder


@pytest.fixture(scope="session")
def dense_checkpoint(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    options = dict(rope_theta=1e4, qk_norm=True, mlp_activation="swiglu")
    save(HybridLM(HybridConfig(pattern="*-*-", **SMALL, **options), seed=0), folder, assets=checkpoint)
    return folder
