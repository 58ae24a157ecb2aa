"""Quantized checkpoints: read by compressed-tensors, read from other programs, and refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter, load, save
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.model import HybridLM, Layout
from nanohybrid.model.quantized import QuantizedLinear, format_in, quantize_model, quantized_names
from nanohybrid.ops import quantized

SIZES = dict(
    vocab_size=40, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=8,
)  # fmt: skip
SWIGLU = dict(rope_theta=1e4, qk_norm=True, mlp_activation="swiglu", layer_norm_epsilon=1e-6)
CONFIGS = {
    "hybrid": HybridConfig("M-*M", **SIZES),
    "hybrid, tied": HybridConfig("M-*", **SIZES, tie_word_embeddings=True),
    "dense": HybridConfig("*-*-", **SIZES, **SWIGLU),
    "dense, no int4 in down_proj": HybridConfig("*-", **{**SIZES, "intermediate_size": 112}, **SWIGLU),
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=quantized.FORMATS)
def format(request):
    return request.param


@pytest.fixture
def stored(config, format, tmp_path):
    """A quantized model and its checkpoint."""
    model = HybridLM(config, seed=1).bfloat16().eval()
    quantize_model(model, format)
    save(model, tmp_path / "stored")
    return model, tmp_path / "stored"


def linears(model):
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def same(ours, theirs):
    """Equal codes and scales, and equal parameters, bit for bit."""
    first, second = linears(ours), linears(theirs)
    assert first.keys() == second.keys()
    for name, linear in first.items():
        assert linear.format == second[name].format
        assert torch.equal(linear.codes.view(torch.uint8), second[name].codes.view(torch.uint8)), name
        assert (
            torch.equal(linear.scales, second[name].scales)
            and linear.scales.dtype == second[name].scales.dtype
        ), name
    plain = dict(theirs.named_parameters())
    assert all(torch.equal(parameter, plain[name]) for name, parameter in ours.named_parameters())


def test_quantized_checkpoint_survives_saving_and_loading(stored):
    model, path = stored
    same(model, load(path))


def test_quantized_checkpoint_survives_saving_in_shards(stored, tmp_path):
    save(stored[0], tmp_path / "shards", max_shard_bytes=12_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    same(stored[0], load(tmp_path / "shards"))


def test_compressed_tensors_decompresses_our_weights_exactly(stored):
    """Through its own parsing of our config.json, its own choice of the scheme for a linear, and its own
    decompression."""
    compressed = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    model, path = stored
    said = QuantizationConfig.model_validate(
        json.loads((path / "config.json").read_text())["quantization_config"]
    )
    assert said.quant_method == "compressed-tensors" and compressed is not None
    tensors = load_file(path / "model.safetensors")
    with CheckpointReader(path) as reader:
        disk = {name: reader._entries[name].name.rpartition(".")[0] for name in reader.formats}
    plain = {
        name.removesuffix(".weight")
        for name in tensors
        if name.endswith("_proj.weight") or name == "lm_head.weight"
    }
    for name, linear in linears(model).items():
        owner = disk[name]
        module = torch.nn.Linear(1, 1)
        schemes = [
            scheme
            for scheme in said.config_groups.values()
            if is_match(owner, module, scheme.targets, said.ignore)
        ]
        assert len(schemes) == 1, owner
        parts = {
            leaf.removeprefix(owner + "."): tensor
            for leaf, tensor in tensors.items()
            if leaf.startswith(owner + ".")
        }
        found = BaseCompressor.get_value_from_registry(schemes[0].format).decompress(parts, schemes[0])[
            "weight"
        ]
        assert torch.equal(found, linear.weight.to(found.dtype)), name
    for owner in plain - set(disk.values()):  # what stays plain must not be taken for quantized
        assert not any(
            is_match(owner, torch.nn.Linear(1, 1), scheme.targets, said.ignore)
            for scheme in said.config_groups.values()
        )


def rewrite(path, change, **config):
    """Change a checkpoint's tensors by a function, and keys of its config.json."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | config))


@pytest.fixture
def of(tmp_path):
    """A quantized hybrid of one format, stored."""

    def make(format):
        model = HybridLM(CONFIGS["hybrid"], seed=1).bfloat16().eval()
        quantize_model(model, format)
        save(model, tmp_path / format)
        return model, tmp_path / format

    return make


def as_written_before(path):
    """Turn int8 as we write it into the layout of versions before 0.2: int8 codes under the plain name."""

    def unpack(tensors):
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            words, owner = tensors.pop(name).to(torch.int64), name.removesuffix("_packed")
            inputs = int(tensors.pop(owner + "_shape")[1])
            codes = torch.stack([(words >> 8 * i & 255) - 128 for i in range(4)], dim=-1).flatten(1)
            tensors[owner] = codes[:, :inputs].to(torch.int8)

    said = json.loads((path / "config.json").read_text())["quantization_config"]
    for group in said["config_groups"].values():
        group["format"] = "naive-quantized"
    rewrite(path, unpack, quantization_config=said | {"format": "naive-quantized"})


def test_reader_reads_int8_of_earlier_versions(of):
    model, path = of("int8")
    as_written_before(path)
    assert load_file(path / "model.safetensors")[IN_PROJ + "weight"].dtype == torch.int8
    same(model, load(path))


def test_int8_rows_that_fill_no_word_survive_saving_and_loading(tmp_path):
    sizes = dict(SIZES, intermediate_size=50)
    model = HybridLM(HybridConfig("-", **sizes), seed=1).bfloat16().eval()
    quantize_model(model, "int8")
    save(model, tmp_path / "odd")
    assert load_file(tmp_path / "odd" / "model.safetensors")[
        "backbone.layers.0.mixer.down_proj.weight_packed"
    ].shape == (64, 13)
    same(model, load(tmp_path / "odd"))


@pytest.mark.parametrize(("format", "group"), [("int8", None), ("int4", 64), ("int4", None)])
def test_reader_spreads_scales_of_larger_groups(of, format, group):
    _, path = of(format)
    weights = {}

    def widen(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            scales = tensors[name].float()
            owner = name.removesuffix("_scale")
            inputs = int(tensors[owner + "_shape"][1])
            groups = 1 if group is None or inputs % group else inputs // group
            tensors[name] = scales[:, :groups].to(torch.float16).contiguous()
            weights[owner] = tensors[name].bfloat16(), inputs // groups

    rewrite(path, widen)
    for name, linear in linears(load(path)).items():
        scales, size = weights[name]
        k = torch.arange(linear.in_features)
        values = quantized.dequantize(linear.codes, torch.ones_like(linear.scales), torch.float32)
        assert torch.equal(linear.weight, values * scales.float()[:, k // size]), name


def test_reader_reads_modelopt_fp8_and_ignores_activation_scales(of):
    model, path = of("fp8")

    def modelopt(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].max().clone()
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor(0.5)

    said = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    rewrite(path, modelopt, quantization_config=said)
    found = linears(load(path))
    for name, linear in linears(model).items():
        assert torch.equal(found[name].scales, linear.scales.max().expand_as(linear.scales)), name
        assert torch.equal(found[name].codes.view(torch.uint8), linear.codes.view(torch.uint8))


def test_reader_reads_hf_quant_config_without_a_key_in_config_json(of):
    model, path = of("fp8")
    rewrite(path, lambda tensors: None, quantization_config=None)
    with pytest.raises(CheckpointError, match="has type F8_E4M3; weights must have one of"):
        load(path)
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    same(model, load(path))


def compressed(format="pack-quantized", weights=(), **more):
    """A quantization_config of compressed-tensors with one group."""
    group = {"weights": {"num_bits": 4, "type": "int", **dict(weights)}}
    said = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"g": group}}
    return said | more


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is bitsandbytes; read are compressed-tensors,"),
        ({"quant_method": "torchao"}, "quant_method is torchao; read are compressed-tensors, modelopt"),
        ({"group_size": 64, "bits": 4}, r"quant_method is None \(of MLX\); read are"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; of gptq 4 and 8 are read"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, r"desc_act is true \(g_idx\): columns in"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format is marlin; of gptq gptq, gptq_v2 are read",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is gemv and bits 4; of awq gemm"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "quant_algo is W4A16_AWQ; of modelopt FP8"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"x": {"quant_algo": "W4A8_AWQ"}},
            },
            "quantized_layers: quant_algo is W4A8_AWQ; of modelopt FP8",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is e5m2; of fp8 only e4m3 is read"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is .128.: a block is two"),
        (compressed(format="marlin-24"), "format is marlin-24; of compressed-tensors pack-quantized,"),
        (compressed(transform_config={"config_groups": {"R": {}}}), "transform_config: rotations of weights"),
        (compressed(weights={"num_bits": 3}), "g: weights are int of 3 bits; read are 8 and 4"),
        (compressed(weights={"actorder": "group"}), r"g: actorder is group \(g_idx\): columns in the order"),
        (compressed() | {"config_groups": {"g": []}}, "g: says nothing of the weights"),
        ([], "quantization_config is not an object"),
    ],
)
def test_reader_names_an_unsupported_quantization_and_the_way_out(of, said, line):
    _, path = of("int4")
    rewrite(path, lambda tensors: None, quantization_config=said)
    with pytest.raises(CheckpointError, match=line) as error:
        load(path)
    if "a block is two" not in line and said:
        assert "ake the checkpoint that it was made from, and quantize that" in str(error.value)


def test_reader_refuses_mlx_by_name(of):
    _, path = of("int4")
    said = {"group_size": 64, "bits": 4}
    rewrite(path, lambda tensors: None, quantization_config=None, quantization=said)
    with pytest.raises(
        CheckpointError, match=r"config[.]json: the quantization of MLX is not read; take the"
    ):
        load(path)


IN_PROJ = "backbone.layers.0.mixer.in_proj."


@pytest.mark.parametrize(
    ("format", "change", "line"),
    [
        ("int4", lambda t: t.pop(IN_PROJ + "weight_scale"), "in_proj.weight_packed: has no weight_scale"),
        (
            "int4",
            lambda t: t.update({IN_PROJ + "weight_packed": t[IN_PROJ + "weight_packed"][:, :4].clone()}),
            r"is \[296, 4\], but",
        ),
        (
            "int8",
            lambda t: t.update({IN_PROJ + "weight": t[IN_PROJ + "weight"][:8].clone()}),
            r"is \[8, 64\], but config.json says \[296",
        ),
        (
            "int8",
            lambda t: t.update({IN_PROJ + "weight": t[IN_PROJ + "weight"].to(torch.int32)}),
            r"is \[296, 64\], but",
        ),
        (
            "int8",
            lambda t: t.update({IN_PROJ + "weight_scale": torch.ones(296, 5)}),
            r"weight_scale: is F32 \[296, 5\], which are no scales of \[296, 64\]",
        ),
        (
            "fp8",
            lambda t: t.update({IN_PROJ + "weight_scale": torch.ones(3, 1)}),
            r"weight_scale: is F32 \[3, 1\]",
        ),
        (
            "fp8",
            lambda t: t.update({"backbone.embeddings.weight_scale": torch.ones(1)}),
            "is not a tensor of the model",
        ),
    ],
)
def test_reader_names_codes_and_scales_that_do_not_fit(of, format, change, line):
    _, path = of(format)
    if format == "int8":
        as_written_before(path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=line):
        load(path)


def test_load_with_quantize_equals_quantizing_the_loaded_model(tmp_path, format):
    model = HybridLM(CONFIGS["dense, no int4 in down_proj"], seed=3).bfloat16().eval()
    save(model, tmp_path / "plain")
    quantize_model(model, format)
    found = load(tmp_path / "plain", quantize=format)
    same(model, found)
    assert load(tmp_path / "plain", torch.float32, quantize=format).dtype == torch.float32
    tokens, layout = torch.arange(9), Layout.packed([9])
    with torch.no_grad():
        assert torch.equal(found(tokens, layout), model(tokens, layout))
    assert load(tmp_path / "plain", device="meta", quantize=format).lm_head.codes.is_meta


def test_load_quantizes_eight_bits_again_and_refuses_four(of, capsys):
    model, path = of("int8")
    same(model, load(path, quantize="int8"))
    assert not capsys.readouterr().err
    again = load(path, quantize="int4")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "nanohybrid: int8: int8 (11) quantized again, to int4" and len(told) == 2
    difference = size = 0.0
    for name, linear in linears(again).items():
        codes, scales = quantized.quantize(linears(model)[name].weight, "int4")
        assert torch.equal(linear.codes, codes) and torch.equal(linear.scales, scales)
        exact = linears(model)[name].weight.double()
        difference += float((linear.weight.double() - exact).square().sum())
        size += float(exact.square().sum())
    share = f"{(difference / size) ** 0.5:.2%}"
    assert (
        told[1]
        == f"nanohybrid: the matrices that were quantized again differ by {share} from the files (norm)"
    )
    _, path = of("int4")
    with pytest.raises(
        InputError, match=r"int4: is quantized already \(int4\), so it cannot be quantized to int8"
    ):
        load(path, quantize="int8")
    with pytest.raises(InputError, match="known are int8, int4, fp8"):
        load(path, quantize="int2")


def test_reader_reads_a_quantized_matrix_as_numbers(of):
    model, path = of("int8")
    with CheckpointReader(path) as reader:
        assert reader.formats == dict.fromkeys(quantized_names(reader.config, "int8"), "int8")
        assert reader.common_dtype == torch.bfloat16
        assert reader.stored_bytes == (path / "model.safetensors").stat().st_size - (
            8 + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
        )
        want = linears(model)[IN_PROJ + "weight"].weight
        assert torch.equal(reader.tensor(IN_PROJ + "weight", torch.float32), want)
        assert torch.equal(reader.tensor(IN_PROJ + "weight"), want.bfloat16())
        assert torch.equal(reader.rows(IN_PROJ + "weight")[5:9], want[5:9])


def test_writer_refuses_a_tensor_for_a_quantized_matrix(tmp_path):
    model = HybridLM(CONFIGS["hybrid"], seed=0)
    with pytest.raises(CheckpointError, match=r"in_proj.weight: is stored quantized \(int8\)"):
        with CheckpointWriter(
            tmp_path / "new", model.config, torch.float32, formats={IN_PROJ + "weight": "int8"}
        ) as writer:
            writer.write(IN_PROJ + "weight", model.get_parameter(IN_PROJ + "weight"))


def test_writer_lists_unquantized_layers_in_config_json(of):
    model, path = of("fp8")
    model.backbone.layers[3].mixer.in_proj = torch.nn.Linear(64, 296, bias=False, dtype=torch.bfloat16)
    save(model, path.with_name("mixed"))
    said = json.loads((path.with_name("mixed") / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["re:.*[.]layers[.]3[.]mixer[.]in_proj$", "re:.*[.]conv1d$"]
    same(model, load(path.with_name("mixed")))
    assert format_in(load(path)) == "fp8"
