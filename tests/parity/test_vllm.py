"""What `quantize` writes, loaded by vLLM's own configuration, model and loader code on a CPU.

Runs where vLLM is installed (CONTRIBUTING.md says how); it is not a requirement. vLLM's wheel has no kernels
for a CPU. So the choice of a kernel is replaced, and pack-quantized products are those of its batch-invariant
mode, which unpacks the words itself and multiplies in torch.
"""

import os
import types

import pytest
import torch

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
pytest.importorskip("vllm", reason="vLLM is not installed; CONTRIBUTING.md says how to run this")

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.utils.marlin_utils import MARLIN_SUPPORTED_GROUP_SIZES
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from nanohybrid.checkpoint import load, save
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.quantize.stage import QuantizeRecipe, quantize_stage

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
)  # fmt: skip
DENSE = dict(SIZES, mlp_activation="swiglu", layer_norm_epsilon=1e-6, rope_theta=1e4)
MODELS = {
    "nemotron_h": HybridConfig("M-*-", **SIZES),
    "llama": HybridConfig("*-*-", **DENSE),
    "qwen3": HybridConfig("*-*-", **DENSE, qk_norm=True),
    "qwen3 tied": HybridConfig("*-*-", **DENSE, qk_norm=True, tie_word_embeddings=True),
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """vLLM's process groups, of this process alone."""
    store = tmp_path_factory.mktemp("vllm") / "store"
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        initialize_model_parallel(1, 1)


@pytest.fixture
def theirs(one_process, monkeypatch):
    """Open a directory with vLLM: its model, with every parameter loaded."""
    packed, floats = schemes.compressed_tensors_wNa16, schemes.compressed_tensors_w8a16_fp8
    monkeypatch.setattr(packed, "matmul_batch_invariant", torch.matmul)
    monkeypatch.setattr(floats, "init_wfp8_a16_linear_kernel", lambda **_: types.SimpleNamespace())

    def open_with_vllm(directory):
        path = str(directory)
        config = VllmConfig(
            model_config=ModelConfig(model=path, tokenizer=path, skip_tokenizer_init=True, dtype="bfloat16"),
            cache_config=CacheConfig(),
            device_config=DeviceConfig("cpu"),
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with set_current_vllm_config(config):
                model = initialize_model(vllm_config=config)
                files = sorted(str(file) for file in directory.glob("*.safetensors"))
                loaded = model.load_weights(safetensors_weights_iterator(files, use_tqdm_on_load=False))
        finally:
            torch.set_default_dtype(before)
        left = {name for name, _ in model.named_parameters()} - set(loaded)
        assert not {name for name in left if ".attn." not in name}, left  # those are scales of a KV cache
        return model

    return open_with_vllm


def our_weights(directory):
    """Every linear of the layers by its name in the files, dequantized by us in fp32."""
    from nanohybrid.checkpoint.names import disk_names

    model = load(directory)
    disk = disk_names(model.config)
    return {
        disk[f"{name}.weight"].removesuffix(".weight"): module.weight.float()
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }


def parts_of(name):
    """The names in the files of the linears that vLLM's linear `name` joins."""
    owner, _, leaf = name.rpartition(".")
    return [f"{owner}.{part}" for part in FUSED.get(leaf, (leaf,))]


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_vllm_loads_what_quantize_writes(kind, format, theirs, tmp_path):
    save(HybridLM(MODELS[kind], seed=1).bfloat16(), tmp_path / "plain")
    out = quantize_stage(QuantizeRecipe(format), tmp_path / "plain", tmp_path / "out")
    model, ours = theirs(out), our_weights(out)
    scheme = "CompressedTensorsW8A16Fp8" if format == "fp8" else "CompressedTensorsWNA16"
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    assert len(linears) >= 6 and "Unquantized" in type(model.lm_head.quant_method).__name__
    for name, linear in linears.items():
        assert type(linear.scheme).__name__ == scheme, name
        files = name.replace("model.", "backbone.", 1) if kind == "nemotron_h" else name
        want = torch.cat([ours[part] for part in parts_of(files)])
        if format == "fp8":
            found = linear.weight.float() * linear.weight_scale.float()
            assert torch.equal(found, want), name
        else:
            assert linear.scheme.group_size in MARLIN_SUPPORTED_GROUP_SIZES
            found = linear.scheme.apply_weights(linear, torch.eye(want.shape[1]), None).T
            assert torch.equal(found.bfloat16(), want.bfloat16()), name


def test_vllm_refuses_int8_as_earlier_versions_wrote_it():
    """naive-quantized, which is why int8 is written in words: where vLLM accepts it, write it again."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "format": "naive-quantized",
    }
    said = {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": {"g": group}}
    with pytest.raises(AssertionError):
        CompressedTensorsConfig.from_config(said)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_vllm_loads_a_quantized_head_of_words(format, theirs, tmp_path):
    save(HybridLM(MODELS["nemotron_h"], seed=1).bfloat16(), tmp_path / "plain")
    out = quantize_stage(QuantizeRecipe(format, quantize_head=True), tmp_path / "plain", tmp_path / "out")
    head, want = theirs(out).lm_head, load(out).lm_head.weight
    assert type(head.scheme).__name__ == "CompressedTensorsWNA16"
    found = head.scheme.apply_weights(head, torch.eye(want.shape[1]), None).T
    assert torch.equal(found[: len(want)].bfloat16(), want.bfloat16())
