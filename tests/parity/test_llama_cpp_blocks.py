"""Files that llama.cpp itself quantized: the same logits here, from the same blocks, in each architecture."""

import pytest
import torch
from gguf_models import SAMPLE, SIZES

from nanohybrid import HybridConfig, HybridLM, load, save
from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.export import GgufExport
from nanohybrid.text import ChatTemplate, train_bpe

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: a benchmark's dependency, built from source"
)
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1}
WIDE |= {"mamba_num_heads": 8, "mamba_head_dim": 32, "num_attention_heads": 8, "head_dim": 32}
DENSE = {**WIDE, "pattern": "*-*-", "rope_theta": 1e4, "mlp_activation": "swiglu"}
CONFIGS = {
    "nemotron_h": HybridConfig(pattern="M-M*-M", **WIDE),
    "qwen3": HybridConfig(**DENSE, qk_norm=True),
    "llama": HybridConfig(**DENSE),
}
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}
F32 = 0


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wide") / "model"
    save(HybridLM(CONFIGS[request.param], seed=3), directory)
    train_bpe([SAMPLE] * 4, 350).save(directory)
    ChatTemplate.default().save(directory)
    with GgufExport(directory, "f32") as export:
        export.write(directory / "f32.gguf")
    return directory / "f32.gguf"


@torch.no_grad()
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_logits_of_what_llama_cpp_quantized(exported, kind):
    """It rounds activations to 8 bits where weights are quantized, so its logits are near ours; the logits of
    the unquantized model are farther away.
    """
    path = exported.with_name(f"{kind}.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[kind], 1
    assert llama_cpp.llama_model_quantize(str(exported).encode(), str(path).encode(), settings) == 0
    with CheckpointReader(path) as reader:
        assert kind in reader.kinds
    tokens = torch.randint(13, 350, (48,))
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        logits_all=True,
        n_threads=1,
        verbose=False,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
    )
    model.eval(tokens.tolist())
    theirs = torch.from_numpy(model.scores[:48].copy())
    ours, plain = (load(one, torch.float32).eval()(tokens[None])[0] for one in (path, exported))
    distance = (ours - theirs).norm() / theirs.norm()
    assert distance < 0.05 and distance < 0.7 * (plain - theirs).norm() / theirs.norm()
