"""What came as `llama` or `qwen3` leaves as such after pruning in whole blocks and after quantization:
transformers opens it, and computes what we compute.
"""

import pytest
import torch

from nanohybrid.checkpoint import load
from nanohybrid.cli.main import main

SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(params=["llama", "qwen3"])
def origin(request, llama, qwen, tmp_path):
    """A tied checkpoint that transformers wrote."""
    model = (llama if request.param == "llama" else qwen)(**SIZES, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "theirs")
    return request.param, tmp_path / "theirs"


@torch.no_grad()
def same(directory, reopened, kind, tolerance):
    theirs, ours = reopened(directory), load(directory, dtype=torch.float32)
    assert theirs.config.model_type == kind
    tokens_BT = torch.arange(40)[None] * 7 % 96
    got, want = theirs(tokens_BT, use_cache=False).logits, ours(tokens_BT)
    assert (got - want).abs().max() / want.abs().max() < tolerance


def test_a_model_without_a_block_opens_in_transformers(origin, reopened, tmp_path):
    kind, directory = origin
    assert main(["prune", str(directory), "--out", str(tmp_path / "pruned"), "--drop-layers", "2,3"]) == 0
    same(tmp_path / "pruned", reopened, kind, 1e-5)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_quantized_model_opens_in_transformers(origin, format, reopened, tmp_path):
    pytest.importorskip("compressed_tensors", reason="how transformers reads quantized checkpoints")
    kind, directory = origin
    assert main(["quantize", str(directory), "--out", str(tmp_path / "small"), "--to", format]) == 0
    same(tmp_path / "small", reopened, kind, 1e-5 if format == "fp8" else 1e-2)
