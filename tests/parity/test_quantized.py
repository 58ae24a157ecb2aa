"""A quantized checkpoint of ours opens in transformers, through its compressed-tensors, with our logits."""

import pytest
import torch

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import quantize_model

pytest.importorskip(
    "compressed_tensors", reason="how transformers reads quantized checkpoints: pip install 'nanohybrid[dev]'"
)
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8, initializer_range=0.1,
)  # fmt: skip
MODELS = {
    "nemotron_h": HybridConfig("M-*-", **SIZES),
    "qwen3": HybridConfig(
        "*-*-", **SIZES, rope_theta=1e4, qk_norm=True, mlp_activation="swiglu", layer_norm_epsilon=1e-6
    ),
}


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_transformers_logits_of_a_quantized_checkpoint_equal_ours(kind, format, reopened, tmp_path):
    ours = HybridLM(MODELS[kind], seed=1).bfloat16().eval()
    quantize_model(ours, format)
    save(ours, tmp_path)
    theirs = reopened(tmp_path)
    tokens = torch.arange(20)[None] * 7 % 96
    got, want = theirs(tokens).logits, ours.float()(tokens)
    # where scales are bf16 the weights that they unpack are rounded to it, and ours here are not
    assert (got - want).abs().max() < (1e-5 if format == "fp8" else 1e-2) * want.abs().max()
