"""Small random models and documents for the tests of pruning, distillation, quantizing and compression."""

import random

import numpy as np
import pytest
import torch

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.data import TokenStore
from nanohybrid.model import HybridLM
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.selection import Selection
from nanohybrid.text import ChatTemplate, train_bpe

SMALL = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=8,
    initializer_range=0.2,
)
DENSE = dict(rope_theta=10_000.0, qk_norm=True, mlp_activation="swiglu", tie_word_embeddings=True)


def make_model(pattern="M-M*-M-", **changes):
    """A model whose every parameter is random, the ones that usually begin at 1 too."""
    config = HybridConfig(pattern=pattern, **(SMALL | changes))
    model = HybridLM(config, seed=3).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model.eval()


def write_parent(root, **changes):
    """`parent`, a checkpoint with a tokenizer, and `sft`, whose stores hold documents for it."""
    rng = np.random.default_rng(0)
    train_bpe(["some words"], 269).save(root / "parent")
    save(make_model(vocab_size=269, **changes).float(), root / "parent")
    (root / "sft" / "stores").mkdir(parents=True)
    documents = [(rng.integers(13, 60, n), np.ones(n)) for n in rng.integers(5, 30, 30)]
    TokenStore.from_documents(documents).write(root / "sft" / "stores" / "chats.safetensors")
    return root


def write_folders(root):
    """`parent`, a checkpoint with a tokenizer and a template; `sft`, with stores for it; `data`, pretraining
    documents."""
    train_bpe(["some words"], 269).save(root / "parent")
    ChatTemplate.default().save(root / "parent")
    save(make_model(vocab_size=269).float(), root / "parent")
    write_store(root / "sft" / "stores" / "chats.safetensors", 0)
    write_store(root / "data" / "web.safetensors", 1)
    write_store(root / "data" / "code.safetensors", 2, count=60)
    write_store(root / "data" / "validation.safetensors", 3)
    return root


def write_store(path, seed, count=30):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    TokenStore.from_documents(
        (rng.integers(13, 60, n), np.r_[np.zeros(2), np.ones(n - 2)]) for n in rng.integers(5, 30, count)
    ).write(path)


def make_calibration():
    """Four random documents."""
    rng = np.random.default_rng(0)
    lengths = [9, 30, 17, 5]
    return Calibration(
        tuple((rng.integers(13, 60, n).astype(np.int32), np.ones(n, dtype=np.uint8)) for n in lengths)
    )


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def dense():
    return make_model("*-*-", **DENSE)


@pytest.fixture
def calibration():
    return make_calibration()


def draw(size, keep, groups=1, seed=0):
    """`keep` random indices, as many in each of `groups` runs."""
    rng, run = random.Random(seed), size // groups
    return tuple(sorted(g * run + i for g in range(groups) for i in rng.sample(range(run), keep // groups)))


def select(config, layers=None, hidden=32, ffn=48, heads=8, channels=8, queries=4):
    """A random selection, another one in every layer."""
    layers = tuple(layers or range(len(config.pattern)))
    at = lambda kind: [i for i in layers if config.pattern[i] == kind]  # noqa: E731
    axes = {
        "hidden_size": {None: draw(32, hidden)},
        "intermediate_size": {i: draw(48, ffn, seed=i) for i in at("-")},
        "mamba_num_heads": {i: draw(8, heads, 2, seed=i) for i in at("M")},
        "mamba_head_dim": {None: draw(8, channels)} if at("M") else {},
        "num_attention_heads": {i: draw(4, queries, 2, seed=i) for i in at("*")},
    }
    return Selection(layers, {name: found for name, found in axes.items() if found})
