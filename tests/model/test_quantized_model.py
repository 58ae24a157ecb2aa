"""A quantized model is the model whose weights are what the codes stand for, on every path, and nothing else
of it changes.
"""

import copy

import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.model import HybridCache, HybridLM, Layout
from nanohybrid.model.quantized import (
    QuantizedLinear,
    format_in,
    quantizable,
    quantize_model,
    quantized_names,
)
from nanohybrid.ops import quantized

CONFIG = HybridConfig(
    "M-*-M", vocab_size=50, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8,
)  # fmt: skip
TIED = CONFIG.replace(tie_word_embeddings=True)
DENSE = CONFIG.replace(
    pattern="*-*-", rope_theta=1e4, qk_norm=True, mlp_activation="swiglu", intermediate_size=112
)  # 112 is no 32s


def rounded(model: HybridLM, format: str) -> HybridLM:
    """The plain model whose matrices are what the codes would stand for."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name in quantized_names(model.config, format):
            parameter = result.get_parameter(name)
            parameter.copy_(quantized.dequantize(*quantized.quantize(parameter, format), parameter.dtype))
    return result


@pytest.mark.parametrize("format", quantized.FORMATS)
@pytest.mark.parametrize("config", [CONFIG, TIED, DENSE], ids=["hybrid", "tied", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_those_of_the_rounded_weights(
    config: HybridConfig, format: str, dtype: torch.dtype
) -> None:
    model = HybridLM(config, seed=1).to(dtype).eval()
    plain = rounded(model, format)
    quantize_model(model, format)
    tokens = torch.arange(14) % 50
    layout = Layout.packed([9, 5])
    assert torch.equal(model(tokens, layout), plain(tokens, layout))
    torch.testing.assert_close(model.head_weight, plain.head_weight, rtol=0, atol=0)
    states = [HybridCache.allocate(config, 1, 4, page_size=4, dtype=dtype, device="cpu") for _ in range(2)]
    for begin, length in ((0, 6), (6, 1), (7, 1)):  # prefill and decode
        layout = Layout.contiguous([length], [begin], [0], 16, 4)
        ours, theirs = (
            m(tokens[begin : begin + length], layout, s) for m, s in zip((model, plain), states, strict=True)
        )
        assert torch.equal(ours, theirs)


def test_linears_of_mixers_and_an_own_head_are_quantized_and_nothing_else() -> None:
    model = HybridLM(CONFIG, seed=0)
    assert quantize_model(model, "int8") == []
    kinds = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {name.removesuffix(".weight") for name in quantizable(CONFIG)}
    assert "lm_head" in kinds and len(kinds) == 1 + 2 + 2 + 2 + 4 + 2
    left = {name.rpartition("mixer.")[2].rpartition("norm")[2] for name, _ in model.named_parameters()}
    assert left == {
        "backbone.embeddings.weight",
        ".weight",
        "_f.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log",
        "D",
    }
    assert format_in(model) == "int8" and format_in(HybridLM(CONFIG)) is None
    assert "lm_head.weight" not in quantizable(TIED)


def test_what_int4_has_no_form_for_stays_and_is_named() -> None:
    model = HybridLM(DENSE, seed=0)
    stays = quantize_model(model, "int4")
    assert stays == ["backbone.layers.1.mixer.down_proj.weight", "backbone.layers.3.mixer.down_proj.weight"]
    assert isinstance(model.get_submodule("backbone.layers.1.mixer.down_proj"), torch.nn.Linear)


@pytest.mark.parametrize("format", quantized.FORMATS)
def test_casting_the_model_leaves_codes_and_scales_alone(format: str) -> None:
    model = HybridLM(CONFIG, seed=0)
    quantize_model(model, format)
    before = copy.deepcopy(model.lm_head)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert (
        model.lm_head.codes.dtype == before.codes.dtype and model.lm_head.scales.dtype == before.scales.dtype
    )
    assert torch.equal(model.lm_head.weight, before.weight)
    assert (model.lm_head.in_features, model.lm_head.out_features, model.lm_head.format) == (64, 50, format)
    assert model.to("meta").lm_head.codes.is_meta


def test_a_model_is_quantized_once_and_to_a_format_that_exists() -> None:
    model = HybridLM(CONFIG, seed=0)
    with pytest.raises(InputError, match="known are int8, int4, fp8"):
        quantize_model(model, "int3")
    quantize_model(model, "int8")
    with pytest.raises(InputError, match=r"quantized already \(int8\)"):
        quantize_model(model, "int4")
    broken = HybridLM(CONFIG, seed=0)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(
        InputError, match=r"lm_head.weight cannot be quantized: holds numbers that are not finite"
    ):
        quantize_model(broken, "int4")
