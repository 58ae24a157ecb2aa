"""Small models as GGUF files: from our export, or rewritten with the types of blocks that others use."""

import json

import gguf
import numpy as np
import torch

from nanohybrid import HybridConfig, HybridLM, load, save
from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.export import GgufExport
from nanohybrid.export.gguf_file import _add_vocabulary
from nanohybrid.export.vocabulary import read_vocabulary
from nanohybrid.text import ChatTemplate, train_bpe

SIZES = dict(
    vocab_size=384, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=4, mamba_head_dim=32, n_groups=2, ssm_state_size=16, initializer_range=0.2,
    max_position_embeddings=512,
)  # fmt: skip
DENSE = dict(rope_theta=5000.0, mlp_activation="swiglu", layer_norm_epsilon=1e-6, pattern="*-*-")
CONFIGS = {
    "hybrid": HybridConfig(pattern="M-M*-M", **SIZES),
    "hybrid, tied": HybridConfig(pattern="M-M*-M", tie_word_embeddings=True, **SIZES),
    "one group": HybridConfig(pattern="M*-", **{**SIZES, "n_groups": 1}),
    "dense": HybridConfig(qk_norm=True, **DENSE, **SIZES),
    "dense, tied": HybridConfig(qk_norm=True, tie_word_embeddings=True, **DENSE, **SIZES),
    "llama": HybridConfig(**DENSE, **SIZES),
    "llama, tied": HybridConfig(tie_word_embeddings=True, **DENSE, **SIZES),
}
SAMPLE = """The quick brown fox counts 1, 2, 3 and 12 + 30 = 42. It's the quick brown fox's, isn't it?
def step(state, x):
    return state * 0.5 + x  # user: System, User, Assistant, think, no_think
Größe, naïve, 東京は日本の首都です, привет мир, مرحبا, 🙂🙂
"""


def checkpoint_of(name, directory, dtype=torch.float32):
    """A checkpoint of random weights with a tokenizer and a template; vectors are random too."""
    model = HybridLM(CONFIGS[name], seed=1)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not parameter_name.endswith(("A_log", "dt_bias")):
            parameter.data.add_(0.2 * parameter.data.clone().normal_())
    save(model.to(dtype), directory)
    train_bpe([SAMPLE] * 4, 350).save(directory)
    ChatTemplate.default().save(directory)
    return directory


def export(directory, kind):
    """The GGUF file of a checkpoint: ours; a Llama is written here, as llama.cpp's converter does."""
    path = directory.with_name(f"{directory.name}-{kind}.gguf")
    if json.loads((directory / "config.json").read_text())["model_type"] == "llama":
        return write_llama(directory, path, gguf.GGMLQuantizationType[kind.upper()])
    with GgufExport(directory, kind) as writer:
        writer.write(path)
    return path


def write_llama(directory, path, kind):
    """A Llama with its rows of q and k in pairs; rows that are no blocks of `kind` stay BF16."""
    model = load(directory).float()
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers // 2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if (vocabulary := read_vocabulary(directory, config.vocab_size)) is not None:
        _add_vocabulary(writer, vocabulary)
    for name, parameter in model.named_parameters():
        target, data = LLAMA_NAMES[name.split(".")[-2]], parameter.detach().numpy()
        if name.startswith("backbone.layers"):
            layer, part = int(name.split(".")[2]), name.split(".")[3]
            target = ("ffn_norm" if layer % 2 else "attn_norm") if part == "norm" else target
            target = f"blk.{layer // 2}.{target}"
        if target.endswith(("attn_q", "attn_k")):
            halves = data.reshape(-1, 2, config.head_dim // 2, data.shape[1])
            data = halves.swapaxes(1, 2).reshape(data.shape)
        own = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else kind
        if data.shape[-1] % gguf.GGML_QUANT_SIZES[own][0]:
            own = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(f"{target}.weight", gguf.quants.quantize(data, own), raw_dtype=own)
    return _finish(writer, path)


LLAMA_NAMES = {
    "embeddings": "token_embd", "norm_f": "output_norm", "lm_head": "output", "norm": "norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def _finish(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewrite(path, kind):
    """A file with its matrices in another type by the gguf package, and its fp32 tensors by our names."""
    number = gguf.GGMLQuantizationType[kind]
    with CheckpointReader(path) as reader:
        names = {entry.name: name for name, entry in reader._entries.items()}
        shapes = {name: reader.shape(name) for name in reader.names()}
        turned = {entry.name: getattr(entry, "head_rows", 0) for entry in reader._entries.values()}
        wanted = {name: reader.tensor(name, torch.float32) for name in reader.names()}
    found, out = gguf.GGUFReader(path), path.with_name(f"{path.stem}-{kind}.gguf")
    writer = gguf.GGUFWriter(out, found.fields["general.architecture"].contents())
    for name, field in found.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            subtype = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=subtype)
    for tensor in found.tensors:
        data, name = gguf.dequantize(tensor.data, tensor.tensor_type), names[tensor.name]
        if data.ndim == 2 and data.shape[1] % 32 == 0 and "mixer" in name and "norm" not in name:
            raw = gguf.quants.quantize(np.ascontiguousarray(data), number)
            writer.add_tensor(tensor.name, raw, raw_dtype=number)
            back = torch.from_numpy(gguf.dequantize(raw, number).copy())
            rows = turned[tensor.name]
            if rows:
                back = back.view(-1, rows // 2, 2, back.shape[1]).transpose(1, 2).reshape(back.shape)
            wanted[name] = back.view(shapes[name])
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    return _finish(writer, out), wanted
