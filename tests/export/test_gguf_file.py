"""A GGUF file has the weights and sizes of the checkpoint under llama.cpp's names; read with the gguf
library."""

import json

import gguf
import numpy as np
import pytest
import torch

from nanohybrid.checkpoint import CheckpointReader, save
from nanohybrid.checkpoint.names import disk_names
from nanohybrid.cli import export_gguf
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.export import TYPES, GgufExport
from nanohybrid.export.repack import SAME
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import QuantizedLinear, quantize_model
from nanohybrid.ops import quantized

from .conftest import CONFIGS, DENSE, HYBRID, LLAMA3, YARN, random_model

EVERY = pytest.mark.parametrize("name", CONFIGS, ids=lambda name: name.replace(" ", "-"))
# the largest error, as a share of a block's largest weight: half of 1/127, and a scale in fp16; a whole 1/8,
# since sixteen values about zero lack the far one of the other sign
BOUNDS = {"q8_0": 0.57 / 127, "q4_0": 1.01 / 8}


def exported(directory, out, kind="bf16"):
    with GgufExport(directory, kind) as export:
        export.write(out)
    return gguf.GGUFReader(out)


def keys(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader):
    """By name: the values as the library reads them, in fp32, and the type."""
    return {
        t.name: (gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]), t.tensor_type.name)
        for t in reader.tensors
    }


def weights(directory):
    with CheckpointReader(directory) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


def expected(name, tensor, config):
    """Our tensors as llama.cpp's source uses them: decays as factors of the exponent, norms by group."""
    if name.endswith("A_log"):
        return -tensor.exp()[:, None]
    if name.endswith("mixer.D"):
        return tensor[:, None]
    if name.endswith("conv1d.weight"):
        return tensor[:, 0]
    if name.endswith("mixer.norm.weight"):
        return tensor.view(config.n_groups, -1)
    if name.endswith(("q_proj.weight", "k_proj.weight")) and config.rope_theta and not config.qk_norm:
        heads = tensor.shape[0] // config.head_dim  # as llama.cpp's converter does it
        halves = tensor.reshape(heads, 2, config.head_dim // 2, tensor.shape[1])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def official_name(name, config):
    """The name that the gguf library's own table gives to the official name."""
    dense = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    arch = dense if config.rope_theta else gguf.MODEL_ARCH.NEMOTRON_H
    table = gguf.get_tensor_name_map(arch, len(config.pattern))
    disk = disk_names(config)[name]
    disk = disk.replace("dt_bias", "dt.bias")  # as llama.cpp's converter does before it looks
    return table.get_name(disk, try_suffixes=(".weight", ".bias"))


@EVERY
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_export_writes_all_weights_under_llama_cpps_names(checkpoint, tmp_path, name, kind):
    config, directory = CONFIGS[name], checkpoint(name)
    found = tensors(exported(directory, tmp_path / "model.gguf", kind))
    assert ("rope_freqs.weight" in found) == (name == "llama 3")
    found.pop("rope_freqs.weight", None)
    ours = weights(directory)
    assert set(found) == {official_name(weight, config) for weight in ours}
    for weight, tensor in ours.items():
        values, stored = found[official_name(weight, config)]
        wanted = expected(weight, tensor, config)
        assert stored == (
            "BF16"
            if kind == "bf16" and weight.endswith(("proj.weight", "lm_head.weight", "embeddings.weight"))
            else "F32"
        )
        if stored == "BF16":
            wanted = wanted.bfloat16().float()
        np.testing.assert_array_equal(values, wanted.numpy(), err_msg=weight)


@pytest.mark.parametrize("kind", BOUNDS)
def test_export_quantizes_within_one_step_and_keeps_vectors_exact(checkpoint, tmp_path, kind):
    config, directory = CONFIGS["hybrid"], checkpoint("hybrid")
    found = tensors(exported(directory, tmp_path / "model.gguf", kind))
    for weight, tensor in weights(directory).items():
        values, stored = found[official_name(weight, config)]
        if weight.endswith(("proj.weight", "lm_head.weight", "embeddings.weight")):
            used = "q8_0" if weight.endswith("embeddings.weight") else kind
            assert stored == used.upper(), weight
            blocks = tensor.reshape(-1, 32)
            errors = (torch.tensor(values).reshape(-1, 32) - blocks).abs()
            assert (errors.amax(1) <= blocks.abs().amax(1) * BOUNDS[used]).all(), weight
        else:
            np.testing.assert_array_equal(values, expected(weight, tensor, config).numpy(), err_msg=weight)


@pytest.mark.parametrize(
    ("format", "kind"), [("int8", "q8_0"), ("int4", "q4_0"), ("int4", "q8_0"), ("fp8", "bf16")]
)
def test_export_of_a_quantized_checkpoint_keeps_its_values(tmp_path, format, kind):
    model = random_model(CONFIGS["hybrid"]).bfloat16()
    quantize_model(model, format)
    save(model, tmp_path / "model")
    found = tensors(exported(tmp_path / "model", tmp_path / "model.gguf", kind))
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert len(linears) > 8
    for weight, linear in linears.items():
        values, stored = found[official_name(weight, CONFIGS["hybrid"])]
        wanted = quantized.dequantize(linear.codes, linear.scales, torch.float32)
        assert stored == kind.upper()
        if (format, kind) in (("int8", "q8_0"), ("int4", "q4_0")):
            np.testing.assert_array_equal(values, wanted.numpy(), err_msg=weight)
        else:
            np.testing.assert_allclose(
                values, wanted.numpy(), atol=0.005 * float(wanted.abs().max()), err_msg=weight
            )


def test_export_keeps_rows_of_incomplete_blocks_in_bf16(checkpoint, tmp_path):
    found = tensors(exported(checkpoint("wide conv, odd sizes"), tmp_path / "model.gguf", "q4_0"))
    assert found["blk.1.ffn_down.weight"][1] == "BF16"  # 100 columns
    assert found["blk.1.ffn_up.weight"][1] == "Q4_0"


def test_encode_in_chunks_gives_the_same_bytes(monkeypatch):
    from nanohybrid.export import encode

    tensor = torch.randn(37, 64)
    whole = encode.encode(tensor, gguf.GGMLQuantizationType.Q8_0, "x")
    monkeypatch.setattr(encode, "CHUNK", 5 * 64)
    assert np.array_equal(encode.encode(tensor, gguf.GGMLQuantizationType.Q8_0, "x"), whole)


def test_export_keys_of_a_hybrid_tell_the_kind_of_each_layer(checkpoint, tmp_path):
    said = keys(exported(checkpoint("attention first and last"), tmp_path / "model.gguf", "q8_0"))
    assert (
        said["general.architecture"] == "nemotron_h"
        and said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    )
    own = {
        key.removeprefix("nemotron_h."): value for key, value in said.items() if key.startswith("nemotron_h.")
    }
    assert (
        own.pop("attention.layer_norm_rms_epsilon")
        == own.pop("attention.layer_norm_epsilon")
        == pytest.approx(1e-5)
    )
    assert own == {
        "vocab_size": 384, "context_length": 512, "embedding_length": 64, "block_count": 6,
        "feed_forward_length": [0, 0, 96, 96, 0, 0], "attention.head_count": 4,
        "attention.head_count_kv": [4, 0, 0, 0, 0, 4], "attention.key_length": 32,
        "attention.value_length": 32, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2,
        "ssm.inner_size": 128, "ssm.time_step_rank": 4,
    }  # fmt: skip


def test_export_keys_of_a_dense_model_are_those_of_qwen3(checkpoint, tmp_path):
    said = keys(exported(checkpoint("dense"), tmp_path / "model.gguf"))
    assert (
        said["general.architecture"] == "qwen3"
        and said["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    )
    own = {key.removeprefix("qwen3."): value for key, value in said.items() if key.startswith("qwen3.")}
    assert own.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert own == {
        "vocab_size": 384, "context_length": 512, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 16, "attention.value_length": 16, "rope.freq_base": 5000.0,
    }  # fmt: skip


def test_export_keys_of_a_llama_have_its_rotary_positions(checkpoint, tmp_path):
    said = {
        name: keys(exported(checkpoint(name), tmp_path / f"{name}.gguf"))
        for name in CONFIGS
        if "llama" in name or "mistral" in name
    }
    assert {one["general.architecture"] for one in said.values()} == {"llama"}
    plain = {key: value for key, value in said["llama"].items() if key.startswith("llama.rope")}
    assert plain == {"llama.rope.freq_base": 5000.0, "llama.rope.dimension_count": 16}
    assert not any("scaling" in key for key in said["llama 3"])
    scaling = {key.removeprefix("llama.rope.scaling."): value for key, value in said["llama, yarn"].items()}
    assert (scaling["type"], scaling["factor"], scaling["original_context_length"]) == ("yarn", 4.0, 64)
    assert said["llama, linear"]["llama.rope.scaling.type"] == "linear"


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (LLAMA3, "rope_scaling is llama3; llama.cpp knows it for llama alone, and this is qwen3"),
        (YARN | {"attention_factor": 1.5}, "multiplies cos and sin by 1.5; llama.cpp does it by 1.13863"),
        (YARN | {"truncate": False}, "truncate of rope_scaling is false"),
        (YARN | {"beta_fast": 16.0}, "beta_fast and beta_slow of rope_scaling are 16 and 1"),
    ],
)
def test_export_refuses_a_scaling_that_llama_cpp_computes_otherwise(tmp_path, scaling, words):
    save(HybridLM(HybridConfig(**DENSE, rope_scaling=scaling)), tmp_path / "model")
    with pytest.raises(InputError, match=words):
        GgufExport(tmp_path / "model")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_export_of_a_quantized_llama_pairs_the_rows_of_codes_and_scales(tmp_path, format):
    model = random_model(CONFIGS["llama"]).bfloat16()
    quantize_model(model, format)
    save(model, tmp_path / "model")
    found = tensors(exported(tmp_path / "model", tmp_path / "model.gguf", SAME[format].lower()))
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(model.backbone.layers[0].mixer, name)
        weight = f"backbone.layers.0.mixer.{name}.weight"
        wanted = expected(
            weight, quantized.dequantize(linear.codes, linear.scales, torch.float32), CONFIGS["llama"]
        )
        values, stored = found[official_name(weight, CONFIGS["llama"])]
        assert stored == SAME[format]
        np.testing.assert_array_equal(values, wanted.numpy(), err_msg=weight)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "llama" in name or "dense" in name])
def test_our_reader_gets_back_what_was_exported(checkpoint, tmp_path, name):
    exported(checkpoint(name), tmp_path / "model.gguf", "f32")
    with CheckpointReader(tmp_path / "model.gguf") as reader:
        wanted = CONFIGS[name].replace(initializer_range=0.02)
        assert reader.config.rope_scaling == wanted.rope_scaling
        for weight, tensor in weights(checkpoint(name)).items():
            assert torch.equal(reader.tensor(weight, torch.float32), tensor), weight


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 1e4}, "rope_theta = 10000.0"),
        ({"qk_norm": True, "mlp_activation": "swiglu"}, "qk_norm.*and.*swiglu"),
        ({"pattern": "*-*-", "mlp_activation": "swiglu"}, "swiglu"),
        ({"time_step_limit": (0.001, 0.1)}, "time_step_limit is .0.001, 0.1."),
        ({"conv_kernel": 1}, "conv_kernel"),
        ({"pattern": "M-M-"}, "M-M- has no attention layer"),
        ({"pattern": "*-*-"}, "has no Mamba-2 layer"),
    ],
)
def test_export_refuses_a_model_without_llama_cpp_architecture(tmp_path, changes, words):
    save(HybridLM(HybridConfig(**{**HYBRID, **changes})), tmp_path / "model")
    with pytest.raises(InputError, match=words) as refused:
        GgufExport(tmp_path / "model")
    assert "\n" not in str(refused.value)


def test_export_ignores_time_step_limit_without_mamba_layers(tmp_path):
    save(HybridLM(HybridConfig(**DENSE, time_step_limit=(0.0, 0.1))), tmp_path / "model")
    with GgufExport(tmp_path / "model") as export:
        assert export.architecture == "qwen3"


def test_export_refuses_f16_that_overflows(tmp_path):
    model = random_model(CONFIGS["dense"])
    model.backbone.layers[1].mixer.up_proj.weight.data[3, 5] = 1e5
    save(model, tmp_path / "model")
    with (
        GgufExport(tmp_path / "model", "f16") as export,
        pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.up_proj.*65,504"),
    ):
        export.write(tmp_path / "model.gguf")


def test_export_stores_a_tied_head_once(checkpoint, tmp_path):
    names = set(tensors(exported(checkpoint("hybrid, tied"), tmp_path / "model.gguf")))
    assert "token_embd.weight" in names and "output.weight" not in names


def test_export_interrupted_leaves_the_old_file_only(checkpoint, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"old")

    def stop(_):
        raise KeyboardInterrupt

    with GgufExport(checkpoint("hybrid")) as export, pytest.raises(KeyboardInterrupt):
        export.write(out, stop)
    assert out.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_export_holds_one_tensor_at_a_time(checkpoint, tmp_path, monkeypatch):
    alive = []
    read = CheckpointReader.tensor

    def tensor(self, name, *rest):
        import weakref

        result = read(self, name, *rest)
        alive.append(weakref.ref(result))
        assert sum(reference() is not None for reference in alive) <= 2, (
            "the one that is written, and the one that is read"
        )
        return result

    monkeypatch.setattr(CheckpointReader, "tensor", tensor)
    told = []
    with GgufExport(checkpoint("hybrid"), "q8_0") as export:
        export.write(tmp_path / "model.gguf", told.append)
        assert len(told) == len(alive) == len(export.tensors)
        assert sum(told) == export.bytes


def test_export_command_prints_a_summary(checkpoint, tmp_path, capsys):
    assert (
        main(
            [
                "export",
                "gguf",
                str(checkpoint("hybrid")),
                str(tmp_path / "model.gguf"),
                "--type",
                "q4_0",
                "--json",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert (
        said["architecture"] == "nemotron_h"
        and said["file_bytes"] == (tmp_path / "model.gguf").stat().st_size
    )
    assert said["bytes_q4_0"] + said["bytes_q8_0"] + said["bytes_f32"] < said["file_bytes"]
    assert tuple(TYPES) == export_gguf.TYPES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "x.gguf"], "nowhere: no such directory"),
        (["MODEL", "."], "is a directory, but a GGUF is one file"),
        (["MODEL", "x.gguf", "--type", "q2_k"], "q2_k"),
        (["MODEL", "/proc/x.gguf"], "/proc/x.gguf: cannot be written"),
    ],
)
def test_export_command_refuses_bad_arguments_in_one_line(
    checkpoint, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "export",
                "gguf",
                *(str(checkpoint("hybrid")) if word == "MODEL" else word for word in arguments),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_export_command_names_the_missing_library(checkpoint, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", "gguf", str(checkpoint("hybrid")), str(tmp_path / "model.gguf")]) == 2
    assert "nanohybrid[gguf]" in capsys.readouterr().err
