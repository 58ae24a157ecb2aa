"""A small checkpoint, and functions that damage one."""

import json
import struct

import pytest

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM

TINY = dict(
    pattern="M-*-", vocab_size=48, hidden_size=16, intermediate_size=24, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=6,
)  # fmt: skip
DENSE = dict(
    TINY, pattern="*-*-", rope_theta=5000.0, qk_norm=True, mlp_activation="swiglu", layer_norm_epsilon=1e-6
)
VARIANTS = {
    "hybrid": HybridConfig(**TINY),
    "hybrid, tied": HybridConfig(**TINY, tie_word_embeddings=True),
    "only Mamba": HybridConfig(**{**TINY, "pattern": "MM"}),
    "hybrid with rotary positions": HybridConfig(**TINY, rope_theta=777.0),
    "hybrid with a gate, tied": HybridConfig(**TINY, mlp_activation="swiglu", tie_word_embeddings=True),
    "dense": HybridConfig(**DENSE),
    "llama, tied": HybridConfig(
        **{**DENSE, "qk_norm": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        tie_word_embeddings=True,
    ),
    "dense, tied": HybridConfig(**DENSE, tie_word_embeddings=True),
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def any_model(request):
    return HybridLM(VARIANTS[request.param], seed=1)


@pytest.fixture
def model():
    return HybridLM(HybridConfig(**TINY), seed=1)


@pytest.fixture
def good(tmp_path, model):
    """A valid checkpoint in one file."""
    save(model, tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture
def sharded(tmp_path, model):
    """The same checkpoint in several files with an index."""
    save(model, tmp_path / "sharded", max_shard_bytes=6000)
    return tmp_path / "sharded"


@pytest.fixture
def edit_header():
    """Rewrite the header of a safetensors file by a function that changes its object."""

    def edit(path, change):
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return edit
