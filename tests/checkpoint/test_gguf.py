"""GGUF files as checkpoints: what was exported comes back, and what others wrote means the same."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_models import CONFIGS, checkpoint_of, export, rewrite
from transformers import AutoTokenizer

from nanohybrid import LLM, HybridConfig, SamplingParams, load, load_config, save
from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.config import used_fields
from nanohybrid.errors import CheckpointError, ConfigError, InputError
from nanohybrid.model.quantized import QuantizedLinear, quantizable
from nanohybrid.ops import quantized
from nanohybrid.stages.fingerprint import fingerprint
from nanohybrid.text import ChatTemplate, Tokenizer

LOST = ("chunk_size", "rescale_prenorm_residual", "initializer_range", "time_step_min", "time_step_max")
"""Fields that GGUF has no key for; none changes what a trained model computes."""


def tensors(path):
    with CheckpointReader(path) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_an_exported_model_comes_back_exactly(tmp_path, name, kind):
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
    directory = checkpoint_of(name, tmp_path / "model", dtype)
    path = export(directory, kind)
    config = load_config(path)
    for field in used_fields(config.pattern) - set(LOST):
        assert getattr(config, field) == getattr(CONFIGS[name], field), field
    before, after = tensors(directory), tensors(path)
    assert before.keys() == after.keys()
    for tensor in before:
        found = after[tensor]
        if tensor.endswith("A_log") and kind == "f32":  # stored as -exp(A_log)
            assert (
                torch.equal(found.exp(), before[tensor].exp())
                and found.sub(before[tensor]).abs().max() < 1e-6
            )
        else:
            assert torch.equal(found.to(dtype), before[tensor]), tensor


@pytest.mark.parametrize("name", ["hybrid", "dense", "llama"])
def test_tokenizer_and_template_come_back(tmp_path, name):
    directory = checkpoint_of(name, tmp_path / "model")
    path = export(directory, "bf16")
    before, after = Tokenizer.from_directory(directory), Tokenizer.from_directory(path)
    for text in ("The quick 東京 fox\n\n  1234 don't", "<SPECIAL_11>x</s>", "", "🙂\ud7ff"):
        for special in (True, False):
            assert after.encode(text, parse_special=special) == before.encode(text, parse_special=special)
    assert after.special_tokens == before.special_tokens and after.stop_ids == before.stop_ids
    assert (after.bos_id, after.eos_id, after.pad_id) == (before.bos_id, before.eos_id, before.pad_id)
    assert ChatTemplate.from_directory(path).source == ChatTemplate.from_directory(directory).source


def test_the_same_text_is_generated_from_the_file(tmp_path):
    directory = checkpoint_of("hybrid", tmp_path / "model")
    prompt, params = "The quick brown fox", SamplingParams(max_tokens=20, ignore_eos=True)
    wanted = LLM(directory).generate([prompt], params)[0].token_ids
    assert LLM(export(directory, "f32")).generate([prompt], params)[0].token_ids == wanted


@pytest.mark.parametrize(("kind", "format"), [("q8_0", "int8"), ("q4_0", "int4")])
@pytest.mark.parametrize("name", ["hybrid", "llama"])
def test_codes_that_are_ours_stay(tmp_path, name, kind, format, capsys):
    path = export(checkpoint_of(name, tmp_path / "model"), kind)
    packed, exact = load(path), load(path, torch.float32)
    line = capsys.readouterr().err.splitlines()[0]
    assert (
        f"unchanged as {format}" in line and "scales rounded from fp16 to bf16" in line and path.name in line
    )
    for tensor, (_, inputs) in quantizable(packed.config).items():
        module, whole = packed.get_submodule(tensor.removesuffix(".weight")), exact.get_parameter(tensor)
        if inputs % 32:
            assert torch.equal(module.weight.float(), whole)  # rows that are no blocks are bf16
            continue
        assert isinstance(module, QuantizedLinear) and module.format == format
        codes = quantized.dequantize(module.codes, torch.ones_like(module.scales), torch.float32)
        scales = module.scales.float().repeat_interleave(32, dim=1)
        assert torch.allclose(codes * scales, whole, rtol=2**-8, atol=0) and len(codes.unique()) > 10
    with CheckpointReader(path) as reader:
        held = sum(t.numel() * t.element_size() for t in (*packed.parameters(), *packed.buffers()))
        assert abs(reader.weight_bytes() - held) <= 0.1 * held  # vectors are fp32 here


def test_a_dtype_or_another_format_dequantizes_first(tmp_path, capsys):
    path = export(checkpoint_of("hybrid", tmp_path / "model"), "q8_0")
    model = load(path, torch.bfloat16)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert "dequantized to bfloat16" in capsys.readouterr().err
    model = load(path, quantize="int4")
    assert {module.format for module in model.modules() if isinstance(module, QuantizedLinear)} == {"int4"}
    assert "quantized as int4" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q4_1"])
def test_blocks_that_others_write_are_the_gguf_packages_numbers(tmp_path, kind):
    """Dequantized, or unchanged as int8 (Q5_0)."""
    path, wanted = rewrite(export(checkpoint_of("llama", tmp_path / "model"), "f32"), kind)
    for name, tensor in tensors(path).items():
        assert torch.equal(tensor.float(), wanted[name].to(tensor.dtype).float()), name
    exact = load(path, torch.float32)
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    packed = load(path)
    found = {module.format for module in packed.modules() if isinstance(module, QuantizedLinear)}
    assert found == ({"int8"} if kind == "Q5_0" else set())
    x = torch.randint(13, 300, (1, 24))
    assert (packed(x).float() - exact(x)).norm() / exact(x).norm() < 0.05


def test_rows_are_read_some_at_a_time(tmp_path, monkeypatch):
    """Also where the rows of a head must be put in order, and pieces end within heads."""
    path, _ = rewrite(export(checkpoint_of("llama", tmp_path / "model"), "f32"), "Q4_1")
    whole = tensors(path)
    monkeypatch.setattr("nanohybrid.checkpoint.gguf_source.PIECE", 64 * 20)
    with CheckpointReader(path) as reader:
        for name in ("backbone.layers.0.mixer.q_proj.weight", "backbone.layers.1.mixer.down_proj.weight"):
            assert torch.equal(reader.tensor(name), whole[name])
            rows = reader.rows(name)
            for begin, end in ((0, 5), (3, 21), (17, 18), (0, rows.shape[0])):
                assert torch.equal(rows[slice(begin, end)].bfloat16(), whole[name][begin:end])


def test_reading_a_tensor_needs_no_second_copy_of_it(tmp_path):
    """At most some pieces beside the result."""
    import tracemalloc

    directory = tmp_path / "model"
    config = HybridConfig(
        "*-", vocab_size=64, hidden_size=1024, intermediate_size=32_768, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rope_theta=1e4, mlp_activation="swiglu",
    )  # fmt: skip
    from nanohybrid import HybridLM

    save(HybridLM(config, seed=0).bfloat16(), directory)
    path, _ = rewrite(export(directory, "bf16"), "Q8_0")
    with CheckpointReader(path) as reader:
        target = torch.zeros(32_768, 1024, dtype=torch.bfloat16)  # 64 MiB
        tracemalloc.start()
        reader.read_into("backbone.layers.1.mixer.up_proj.weight", target)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20 and target.std() > 0
        tracemalloc.stop()


def test_a_saved_model_has_tokenizer_and_template_of_the_file(tmp_path):
    path = export(checkpoint_of("llama", tmp_path / "model"), "bf16")
    save(load(path), tmp_path / "saved", assets=path)
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"
    ours, theirs = (
        Tokenizer.from_directory(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    text = "The quick 東京 fox <SPECIAL_11> 42"
    assert ours.encode(text) == theirs.encode(text) == Tokenizer.from_directory(path).encode(text)
    assert theirs.chat_template == ChatTemplate.from_directory(path).source


def test_a_fingerprint_is_that_of_the_bytes(tmp_path):
    path = export(checkpoint_of("hybrid", tmp_path / "model"), "bf16")
    first = fingerprint(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert first.startswith("sha256:") and fingerprint(path) != first


def changed(path, **keys):
    """The file with other values of keys, written by the gguf package; None removes a key."""
    reader, out = gguf.GGUFReader(path), path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = keys.pop(name, field.contents())
        if name.startswith(("GGUF.", "general.architecture")) or value is None:
            continue
        subtype = field.types[1] if len(field.types) > 1 else None
        kind = field.types[0] if not isinstance(value, str) else gguf.GGUFValueType.STRING
        writer.add_key_value(name, value, kind, sub_type=subtype)
    for name, value in keys.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


REFUSED = [
    (
        "hybrid",
        {"nemotron_h.embedding_length": 65},
        CheckpointError,
        "token_embd.weight: is .* but the metadata",
    ),
    ("hybrid", {"nemotron_h.block_count": 5}, CheckpointError, "head_count_kv has 6 entries for 5 blocks"),
    (
        "hybrid",
        {"nemotron_h.block_count": 2**31},
        CheckpointError,
        "block_count is .* must be from 1 to 10,000",
    ),
    ("hybrid", {"nemotron_h.ssm.inner_size": None}, CheckpointError, "ssm.inner_size is 0, and no multiple"),
    (
        "hybrid",
        {"nemotron_h.embedding_length": None},
        CheckpointError,
        "nemotron_h.embedding_length is missing",
    ),
    (
        "hybrid",
        {"nemotron_h.ssm.state_size": "x"},
        CheckpointError,
        "ssm.state_size is .* must be a whole number",
    ),
    ("llama", {"llama.expert_count": 8}, CheckpointError, "a mixture of experts is not supported"),
    ("llama", {"llama.rope.dimension_count": 8}, CheckpointError, "partial RoPE is not supported"),
    (
        "llama",
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4},
        CheckpointError,
        "longrope",
    ),
    ("llama", {"llama.attention.key_length": 21}, CheckpointError, "key_length and value_length differ"),
    ("llama", {"llama.attention.head_count_kv": 3}, ConfigError, "num_attention_heads"),
    ("llama", {"llama.block_count": 3}, CheckpointError, "blk.2.attn_norm.weight is missing"),
    ("llama", {"llama.block_count": 1}, CheckpointError, "blk.1.attn.*and 8 more.*is no tensor of its llama"),
]


@pytest.mark.parametrize(("name", "keys", "error", "match"), REFUSED, ids=lambda value: str(value)[:60])
def test_metadata_that_contradicts_itself_is_refused_in_one_line(tmp_path, name, keys, error, match):
    path = changed(export(checkpoint_of(name, tmp_path / "model"), "f32"), **keys)
    with pytest.raises(error, match=match) as caught, CheckpointReader(path):
        pass
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = export(checkpoint_of("llama", tmp_path / "model"), "f32")
    content = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1)
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"its architecture is .?gemma.?; known are nemotron_h, qwen3, llama"
    ):
        load_config(path)


def test_a_damaged_decay_is_refused(tmp_path):
    path = export(checkpoint_of("hybrid", tmp_path / "model"), "f32")
    with CheckpointReader(path) as reader:
        entry = reader._entries["backbone.layers.0.mixer.A_log"]
    content = bytearray(path.read_bytes())
    content[entry.begin + 3] &= 0x7F  # the sign
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a: has values that are not below 0"):
        load(path)


def test_a_quantized_file_is_not_quantized_to_nothing(tmp_path):
    path = export(checkpoint_of("hybrid", tmp_path / "model"), "q8_0")
    with pytest.raises(InputError, match="known are int8, int4, fp8"):
        load(path, quantize="int3")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_codes_in_groups_of_the_file_are_saved(tmp_path, kind):
    path = export(checkpoint_of("hybrid", tmp_path / "model"), kind)
    model = load(path)
    save(model, tmp_path / "saved", assets=path)
    again = load(tmp_path / "saved").state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
