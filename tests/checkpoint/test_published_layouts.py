"""Checkpoints in the layouts of other programs: each gives the numbers of its published definition."""

import json
from functools import partial

import pytest
import torch
from published_layouts import awq, fp8_blocks, fp8_rows, fp8_whole, gptq, int8_rows, nvfp4, packed
from safetensors.torch import load_file, save_file

from nanohybrid.checkpoint import CheckpointReader, load, save
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.model import HybridLM, Layout
from nanohybrid.model.quantized import QuantizedLinear, quantizable
from nanohybrid.ops import quantized

SIZES = dict(
    vocab_size=48, hidden_size=192, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
)  # fmt: skip
CONFIGS = {
    "hybrid": HybridConfig("M-*", **SIZES),
    "dense": HybridConfig(
        "*-", **SIZES, rope_theta=1e4, qk_norm=True, mlp_activation="swiglu", layer_norm_epsilon=1e-6
    ),
}


def said(format, **weights):
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "format": format}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


INT4, INT8 = {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}
FLOAT8, FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}
MODELOPT, QWEN = {"quant_method": "modelopt"}, {"quant_method": "fp8", "activation_scheme": "dynamic"}
MIXED = {
    **MODELOPT,
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
}
# name: how a matrix is made, what config.json says, the format that it is read as, what it is called
LAYOUTS = {
    "ct W8A16 group 32": (  # smaller than our own groups of some rows
        partial(packed, bits=8, group=32), said("pack-quantized", **INT8), "int8", "int8 in groups of 32"
    ),
    "ct W8A16 group 16": (
        partial(packed, bits=8, group=16), said("pack-quantized", **INT8), "int8", "int8 in groups of 16"
    ),
    "ct W8A16 rows": (partial(packed, bits=8, group=None), said("pack-quantized", **INT8), "int8", "int8"),
    "ct W8A16 asymmetric": (
        partial(packed, bits=8, group=32, asymmetric=True), said("pack-quantized", **INT8), None,
        "8-bit integers with zero points",
    ),
    "ct W4A16 group 32": (partial(packed, bits=4, group=32), said("pack-quantized", **INT4), "int4", "int4"),
    "ct W4A16 group 16": (
        partial(packed, bits=4, group=16), said("pack-quantized", **INT4), "int8", "int4 in groups of 16"
    ),
    "ct W4A16 asymmetric": (
        partial(packed, bits=4, group=32, asymmetric=True), said("pack-quantized", **INT4, symmetric=False),
        "int8", "4-bit integers with zero points",
    ),
    "ct W8A8": (int8_rows, said("int-quantized", **INT8), "int8", "int8"),
    "ct W8A8 asymmetric": (
        partial(int8_rows, asymmetric=True), said("int-quantized", **INT8), None,
        "8-bit integers with zero points",
    ),
    "ct FP8 rows": (partial(fp8_rows, column=True), said("float-quantized", **FLOAT8), "fp8", "fp8"),
    "ct FP8 blocks": (
        fp8_blocks, said("float-quantized", **FLOAT8, strategy="block", block_structure=[128, 128]), "fp8",
        "FP8 in blocks of 128 x 128",
    ),
    "Qwen3-8B-FP8": (
        partial(fp8_blocks, name="weight_scale_inv", dtype=torch.bfloat16),
        QWEN | {"weight_block_size": [128, 128]}, "fp8", "FP8 in blocks of 128 x 128",
    ),
    "fp8 blocks of 64 x 32": (
        partial(fp8_blocks, block=(64, 32), name="weight_scale_inv"), QWEN | {"weight_block_size": [64, 32]},
        "fp8", "FP8 in blocks of 64 x 32",
    ),
    "fp8 blocks of 40 x 36": (
        partial(fp8_blocks, block=(40, 36), name="weight_scale_inv"), QWEN | {"weight_block_size": [40, 36]},
        None, "FP8 in blocks of 40 x 36",
    ),
    "ModelOpt FP8": (fp8_whole, MODELOPT | {"quant_algo": "FP8"}, "fp8", "fp8"),
    "ModelOpt FP8 rows": (fp8_rows, MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "fp8", "fp8"),
    "ModelOpt FP8 blocks": (
        partial(fp8_blocks, ones=True), MODELOPT | {"quant_algo": "FP8_PB_WO"}, "fp8",
        "FP8 in blocks of 128 x 128",
    ),
    "ModelOpt NVFP4": (nvfp4, MODELOPT | {"quant_algo": "NVFP4", "group_size": 16}, "int8", "NVFP4"),
    "ct NVFP4": (
        partial(nvfp4, modelopt=False), said("nvfp4-pack-quantized", **FLOAT4, strategy="tensor_group"),
        "int8", "NVFP4",
    ),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "sym": True}, "int4", "GPTQ in 4 bits"),
    "GPTQ asymmetric": (
        partial(gptq, asymmetric=True), {"quant_method": "gptq", "bits": 4, "sym": False}, "int8",
        "GPTQ in 4 bits",
    ),
    "GPTQ 8 bits": (
        partial(gptq, bits=8), {"quant_method": "gptq", "bits": 8, "sym": True}, "int8", "GPTQ in 8 bits"
    ),
    "GPTQ v2": (
        partial(gptq, offset=0),
        {"quant_method": "gptq", "bits": 4, "sym": True, "checkpoint_format": "gptq_v2"}, "int4",
        "GPTQ in 4 bits",
    ),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, "int8", "AWQ"),
}  # fmt: skip


def publish(path, config, make, quantization, skip=()):
    """Save a checkpoint whose matrices are in a layout; the numbers of each by name."""
    torch.manual_seed(5)
    save(HybridLM(config, seed=2).bfloat16(), path)
    tensors, numbers = load_file(path / "model.safetensors"), {}
    with CheckpointReader(path) as reader:
        disk = {name: reader._entries[name].name for name in quantizable(config)}
    for name, stored in disk.items():
        if name not in skip:
            parts, numbers[name] = make(tensors.pop(stored).float())
            owner = stored.removesuffix("weight")
            tensors |= {owner + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, path / "model.safetensors")
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"quantization_config": quantization}))
    return numbers


DENSE = ("ct W4A16 asymmetric", "Qwen3-8B-FP8", "ModelOpt NVFP4", "GPTQ", "AWQ")


@pytest.mark.parametrize(
    ("layout", "kind"), [*((one, "hybrid") for one in LAYOUTS), *((one, "dense") for one in DENSE)]
)
def test_layout_gives_the_numbers_of_its_definition(layout, kind, tmp_path, capsys):
    make, quantization, format, label = LAYOUTS[layout]
    numbers = publish(tmp_path, CONFIGS[kind], make, quantization)
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.layouts.values()) == {label}
        assert reader.formats == ({} if format is None else dict.fromkeys(numbers, format))
        for name, want in numbers.items():
            found = reader.tensor(name, torch.float64)
            assert torch.allclose(found, want, rtol=3e-7, atol=0), name  # products in fp32
            rows = reader.rows(name)[17:42]
            assert torch.equal(rows.double(), found[17:42])
        expected = reader.weight_bytes()
    model = load(tmp_path)
    told = capsys.readouterr().err
    linears = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears.keys() == ({} if format is None else numbers).keys()
    for name, want in numbers.items():
        weight = linears[name].weight if name in linears else model.get_parameter(name)
        # scales of int8 and int4 are rounded to bf16, of fp8 they are not; plain weights are bf16
        exact = format == "fp8" or layout.startswith("ct W8A16 g") or layout in ("ct W8A8", "ct FP8 rows")
        assert torch.allclose(weight.double(), want, rtol=3e-7 if exact else 2**-8, atol=0), name
    tensors = [*model.parameters(), *model.buffers()]
    assert expected == sum(tensor.nbytes for tensor in tensors)
    if label in quantized.FORMATS:
        assert not told
    else:
        became = "dequantized to bfloat16" if format is None else f"read as {format} with the same codes"
        assert told == f"nanohybrid: {tmp_path.name}: {label} ({len(numbers)}) {became}\n"


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_computes_as_its_numbers_and_survives_saving(layout, tmp_path):
    make, quantization, *_ = LAYOUTS[layout]
    numbers = publish(tmp_path / "theirs", CONFIGS["hybrid"], make, quantization)
    model = load(tmp_path / "theirs").eval()
    plain = load_file(tmp_path / "theirs" / "model.safetensors")
    want = HybridLM(CONFIGS["hybrid"]).float().eval()
    for name, parameter in want.named_parameters():
        parameter.copy_(numbers[name] if name in numbers else plain[name].float())
    tokens, packed_tokens = torch.arange(23), Layout.packed([23])
    logits, wanted = model.float()(tokens, packed_tokens), want(tokens, packed_tokens)
    assert (logits - wanted).abs().max() < 1e-2 * wanted.abs().max()
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    again = load(tmp_path / "ours").eval().float()
    assert torch.equal(again(tokens, packed_tokens), logits)


@pytest.mark.parametrize("kind", ["hf_quant_config.json", "quantize_config.json"])
def test_quantization_in_a_file_of_its_own(kind, tmp_path):
    make, quantization, format, _ = LAYOUTS["ModelOpt NVFP4" if kind.startswith("hf") else "GPTQ"]
    numbers = publish(tmp_path, CONFIGS["hybrid"], make, None)
    inner = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / kind).write_text(json.dumps(inner if kind.startswith("hf") else {"bits": 4, "sym": True}))
    assert quantization
    with CheckpointReader(tmp_path) as reader:
        assert reader.formats == dict.fromkeys(numbers, format)


def test_modelopt_mixed_precision_has_a_layout_for_each_matrix(tmp_path, capsys):
    makers = iter([fp8_whole, nvfp4] * 9)
    head = "lm_head.weight"
    numbers = publish(tmp_path, CONFIGS["hybrid"], lambda weight: next(makers)(weight), MIXED, skip=[head])
    model = load(tmp_path)
    formats = {n: m.format for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(formats.values()) == {"fp8", "int8"} and head not in numbers
    for name, want in numbers.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert torch.allclose(weight.double(), want, rtol=2**-8, atol=0), name
    assert "NVFP4 (4) read as int8 with the same codes" in capsys.readouterr().err


def test_nvfp4_is_quantized_to_int4_and_says_what_that_costs(tmp_path, capsys):
    make, quantization, *_ = LAYOUTS["ModelOpt NVFP4"]
    numbers = publish(tmp_path, CONFIGS["hybrid"], make, quantization)
    model, error, size = load(tmp_path, quantize="int4"), 0.0, 0.0
    for name, want in numbers.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        with CheckpointReader(tmp_path) as reader:
            codes, _ = quantized.quantize(reader.tensor(name, torch.float32), "int4")
        assert linear.format == "int4" and torch.equal(linear.codes, codes)
        error += float((linear.weight.double() - want).square().sum())
        size += float(want.square().sum())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(f": NVFP4 ({len(numbers)}) quantized again, to int4")
    assert f"differ by {(error / size) ** 0.5:.2%} from the files" in lines[1]


def test_four_bits_of_gptq_are_not_quantized_again(tmp_path):
    make, quantization, *_ = LAYOUTS["GPTQ"]
    publish(tmp_path, CONFIGS["hybrid"], make, quantization)
    with pytest.raises(InputError, match=r"is quantized already \(int4\), so it cannot be quantized to int8"):
        load(tmp_path, quantize="int8")


def test_dequantized_matrices_have_the_dtype_that_is_asked_for(tmp_path, capsys):
    make, quantization, *_ = LAYOUTS["ct W8A16 asymmetric"]
    numbers = publish(tmp_path, CONFIGS["hybrid"], make, quantization)
    model = load(tmp_path, dtype=torch.float32)
    assert "8-bit integers with zero points (9) dequantized to float32" in capsys.readouterr().err
    for name, want in numbers.items():
        assert torch.allclose(model.get_parameter(name).double(), want, rtol=3e-7, atol=0), name


@pytest.mark.parametrize("layout", ["ct W8A16 asymmetric", "Qwen3-8B-FP8", "ModelOpt NVFP4", "AWQ"])
def test_inspect_names_the_layout(layout, tmp_path, capsys):
    make, quantization, format, label = LAYOUTS[layout]
    publish(tmp_path, CONFIGS["hybrid"], make, quantization)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layouts"] == {label: 9} and told["dtype"].startswith(format or "bfloat16")
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"matrices in the files: 9 x {label}\n" in capsys.readouterr().out


DOWN = "backbone.layers.1.mixer.down_proj."


@pytest.mark.parametrize(
    ("layout", "change", "line"),
    [
        (
            "ct FP8 blocks",
            lambda t: t.update({DOWN + "weight_scale": torch.ones(3, 3)}),
            r"weight_scale: is \[3, 3\], but blocks of \[128, 128\] in \[192, 320\] are \[2, 3\]",
        ),
        (
            "Qwen3-8B-FP8",
            lambda t: t.pop(DOWN + "weight_scale_inv"),
            "down_proj.weight: has no weight_scale",
        ),
        (
            "ct W4A16 group 32",
            lambda t: t.update({DOWN + "weight_g_idx": torch.arange(320, dtype=torch.int32) // 32}),
            "weight_g_idx: columns in the order of their activations are not read",
        ),
        (
            "ct W4A16 asymmetric",
            lambda t: t.update({DOWN + "weight_zero_point": torch.zeros(24, 9, dtype=torch.int32)}),
            r"weight_zero_point: is \[24, 9\], but config.json says \[24, 10\]",
        ),
        (
            "ModelOpt NVFP4",
            lambda t: t.pop(DOWN + "weight_scale_2"),
            "has no weight_scale, or not one of weight_scale_2 and weight_global_scale",
        ),
        (
            "ModelOpt NVFP4",
            lambda t: t.update({DOWN + "weight_scale": t[DOWN + "weight_scale"].float()}),
            "weight_scale: is F32; known is F8_E4M3",
        ),
        (
            "ModelOpt NVFP4",
            lambda t: t.update({DOWN + "pre_quant_scale": torch.ones(320)}),
            "pre_quant_scale: is not a tensor of the model",
        ),
        ("GPTQ", lambda t: t.pop(DOWN + "qzeros"), "qweight: has no qzeros"),
        (
            "AWQ",
            lambda t: t.update({DOWN + "qweight": t[DOWN + "qweight"].T.contiguous()}),
            r"qweight: is \[24, 320\], but config.json says \[320, 24\]",
        ),
        (
            "GPTQ",
            lambda t: t.update({DOWN + "g_idx": t[DOWN + "g_idx"].flip(0)}),
            r"g_idx: columns in the order of their activations \(desc_act\) are not read",
        ),
        (
            "GPTQ",
            lambda t: t.update({DOWN + "qzeros": t[DOWN + "qzeros"] + 1}),
            "qzeros: has other zero points than the middle, but config.json says sym",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(layout, change, line, tmp_path):
    make, quantization, *_ = LAYOUTS[layout]
    publish(tmp_path, CONFIGS["hybrid"], make, quantization)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=line):
        load(tmp_path)
