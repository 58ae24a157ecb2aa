"""`nanohybrid inspect`: the numbers of the paper's models, from a configuration or from file headers."""

import json
import time

import pytest

import nanohybrid
from nanohybrid.checkpoint import save
from nanohybrid.cli.main import main
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import quantize_model


def inspect(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_says_that_the_9b_at_128k_fits_22_gib_and_qwen3_8b_does_not(capsys):
    hybrid = inspect(capsys, "--preset", "nano-9b-v2", "--budget-gib", 22, "--context", 131_072)
    assert hybrid["parameters"] == 8_888_227_328 and hybrid["weight_bytes"] == 2 * 8_888_227_328
    assert hybrid["kv_bytes_per_token"] == 16_384 and hybrid["state_bytes_per_sequence"] == 27 * (
        128 * 80 * 128 * 4 + 3 * 12_288 * 2
    )
    assert hybrid["fits"] is True and hybrid["max_context"] > 131_072
    dense = inspect(capsys, "--preset", "qwen3-8b", "--budget-gib", 22, "--context", 131_072)
    assert dense["fits"] is False and dense["max_batch"] == 0 and 40_000 < dense["max_context"] < 131_072


def test_inspect_reports_the_largest_batch_that_fits(capsys):
    at = inspect(capsys, "--preset", "nano-9b-v2", "--context", 24_576)["max_batch"]
    assert inspect(capsys, "--preset", "nano-9b-v2", "--context", 24_576, "--batch", at)["fits"] is True
    assert inspect(capsys, "--preset", "nano-9b-v2", "--context", 24_576, "--batch", at + 1)["fits"] is False


def test_inspect_reads_headers_only(good, model, capsys, edit_header):
    found = inspect(capsys, good)
    assert found["dtype"] == "float32" and found["weight_bytes"] == sum(p.nbytes for p in model.parameters())
    assert inspect(capsys, good, "--dtype", "bf16")["weight_bytes"] == found["weight_bytes"] // 2
    edit_header(good / "model.safetensors", lambda header: header["lm_head.weight"].update(shape=[16, 48]))
    assert main(["inspect", str(good)]) == 2
    assert "lm_head.weight" in capsys.readouterr().err
    (good / "model.safetensors").unlink()
    assert inspect(capsys, good)["dtype"] == "bfloat16"  # config.json alone is enough


def test_inspect_reports_no_context_limit_without_attention(tmp_path, capsys):
    config = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MM",
        "vocab_size": 64,
        "hidden_size": 32,
        "mamba_num_heads": 4,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8})
    )
    assert inspect(capsys, tmp_path)["max_context"] is None
    assert main(["inspect", str(tmp_path)]) == 0
    assert "unbounded" in capsys.readouterr().out


def test_inspect_prints_pattern_and_parts(capsys):
    assert main(["inspect", "--preset", "nano-12b-v2"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-",
        "62 layers",
        "attention",
        "12,310,001,152",
        "22.93 GiB",
        "no positions",
        "no",
    ):
        assert part in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--preset", "nano-9b"],
        ["/nowhere"],
        ["x", "--preset", "tiny"],
        ["--preset", "tiny", "--batch", "0"],
        ["--preset", "tiny", "--context", "-5"],
        ["--preset", "tiny", "--budget-gib", "nan"],
    ],
)
def test_inspect_refuses_bad_arguments_in_one_line(arguments, capsys):
    assert main(["inspect", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.alone
def test_inspect_of_a_preset_is_fast(capsys):
    begin = time.perf_counter()
    inspect(capsys, "--preset", "nano-12b-v2")
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_inspect_reports_the_stored_bytes_of_a_quantized_checkpoint(tmp_path, capsys, format):
    config = nanohybrid.preset("tiny")
    quantized = HybridLM(config, seed=0).bfloat16()
    quantize_model(quantized, format)
    save(quantized, tmp_path / "q")
    found = inspect(capsys, tmp_path / "q")
    tensors = [*quantized.parameters(), *quantized.buffers()]
    assert found["weight_bytes"] == sum(tensor.nbytes for tensor in tensors) and found["dtype"] == format
    assert inspect(capsys, "--preset", "tiny", "--dtype", format)["weight_bytes"] == found["weight_bytes"]
    assert found["parameters"] == sum(p.numel() for p in HybridLM(config).parameters())
    plans = []
    for source in ([str(tmp_path / "q")], ["--preset", "tiny", "--dtype", format]):
        assert main(["plan", "serve", *source, "--memory-gib", "2", "--context", "1024", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert (
        plans[0] == plans[1]
        and plans[0]["weight_bytes"] == found["weight_bytes"]
        and plans[0]["dtype"] == format
    )
