"""What follows distillation: a budget for 8 or 4 bits, right answers after every step, a file for
llama.cpp."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from compress_models import make_model, write_parent

from nanohybrid.checkpoint import load, save
from nanohybrid.cli.main import main
from nanohybrid.compress import latency_table
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import compress
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.engine import LLM, SamplingParams
from nanohybrid.estimate import free_memory
from nanohybrid.estimate.budget import STEP, Budget
from nanohybrid.evaluate import EvaluateRecipe
from nanohybrid.evaluate import accuracy as answers
from nanohybrid.model.quantized import QuantizedLinear, format_in
from nanohybrid.stages.recipe import dump
from nanohybrid.train import LoopConfig, OptimizerConfig, PrecisionConfig

DISTILL = DistillRecipe(
    tokens=200,
    batch_tokens=100,
    sequence_length=40,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    precision=PrecisionConfig("fp32"),
    loop=LoopConfig(snapshot_steps=2, log_steps=1),
    measured_tokens=100,
)
RECIPE = CompressRecipe(
    quantize="int8",
    gguf="q8_0",
    problems=3,
    tasks=("sums", "parity"),
    context=64,
    num_calibration_samples=8,
    max_calibration_length=30,
    distill=DISTILL,
    grid=Grid(
        multiple=4,
        max_evaluated=2,
        fractions={
            "hidden_size": (1.0,),
            "intermediate_size": (1.0, 0.75, 0.5),
            "mamba_head_dim": (1.0, 0.5),
        },
    ),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent with a tokenizer, and documents."""
    return write_parent(tmp_path_factory.mktemp("compress-end"), hidden_size=64, intermediate_size=128)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A model that knows nothing would talk to the end."""
    monkeypatch.setattr(answers, "EvaluateRecipe", partial(EvaluateRecipe, max_tokens=6))


def command(folders, recipe, out):
    (folders / "recipe.toml").write_text(dump(recipe))
    data, path = str(folders / "sft"), str(folders / "recipe.toml")
    return ["compress", str(folders / "parent"), "--recipe", path, "--data", data, "--out", str(out)]


@pytest.fixture(scope="module")
def result(folders):
    """The whole command for 80 % of what the parent takes in int8: what it remembers, and where."""
    budget = Budget(1, 64, dtype="int8", step=STEP, quantize_head=False)
    whole = budget.memory(load(folders / "parent").config).total
    recipe, patch = replace(RECIPE, budget_bytes=int(0.8 * whole)), pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(answers, "EvaluateRecipe", partial(EvaluateRecipe, max_tokens=6))
        assert main(command(folders, recipe, folders / "small")) == 0
    return folders / "small", json.loads((folders / "small" / "lineage.json").read_text())["measures"], recipe


def test_compress_refuses_problems_for_a_model_that_does_not_fit_memory(
    folders, tmp_path, capsys, monkeypatch
):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 100 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", meminfo)
    assert main(command(folders, RECIPE, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert (
        "the weights take" in error
        and len(error.splitlines()) == 1
        and not (tmp_path / "out.partial").exists()
    )


def test_compress_budget_is_for_the_quantized_format(folders, result, tmp_path, capsys):
    out, measures, recipe = result
    chosen = json.loads((out / "search" / "search.json").read_text())["candidates"][0]
    assert chosen["bytes"]["total"] <= recipe.budget_bytes
    assert (
        measures["inference"]["result"]["weight_bytes"] == chosen["bytes"]["weights"]
    )  # as loaded, against the plan
    assert measures["inference"]["parent"]["weight_bytes"] == 2 * measures["parent_parameters"]
    assert (
        main(command(folders, replace(recipe, quantize=None), tmp_path / "bf16")) == 2
    )  # no shape fits these bytes in bf16
    assert "no shape of the grid fits" in capsys.readouterr().err.splitlines()[-1]


def test_compress_result_is_the_quantized_distilled_model_and_generates(result):
    out, _, _ = result
    model, distilled = load(out, dtype=torch.float32), load(out / "distilled", dtype=torch.float32)
    assert format_in(model) == "int8" and model.config == distilled.config
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = distilled.get_parameter(f"{name}.weight")
            assert (module.weight - weight).norm() < 0.01 * weight.norm(), name
    assert len(LLM(out).generate(["some words"], SamplingParams(max_tokens=3))[0].token_ids) > 0


def test_compress_report_has_accuracy_and_bytes_of_each_step(result):
    out, measures, _ = result
    steps = ["parent", "pruned", "distilled", "quantized"]
    assert [list(measures[name]) for name in ("losses", "agreement", "accuracy")] == [steps] * 3
    assert (
        measures["quantized"]["top1_agreement"] > 0.9
        and abs(measures["quantized"]["perplexity_change"]) < 0.02
    )
    assert measures["losses"]["quantized"] == pytest.approx(measures["losses"]["distilled"], abs=0.02)
    assert {found["problems"] for found in measures["accuracy"].values()} == {6}
    page = (out / "report.html").read_text()
    for words in ("In int8", "Accuracy by family", "model-q8_0.gguf", "the base model in bf16"):
        assert words in page


def test_compress_gguf_has_the_codes_of_the_quantized_checkpoint(result):
    gguf = pytest.importorskip("gguf")
    out, measures, _ = result
    reader = gguf.GGUFReader(out / "model-q8_0.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}["blk.1.ffn_up.weight"]
    values = gguf.dequantize(stored.data, stored.tensor_type)
    wanted = load(out, dtype=torch.float32).get_submodule("backbone.layers.1.mixer.up_proj").weight
    assert stored.tensor_type.name == "Q8_0" and np.array_equal(values, wanted.numpy())
    assert (
        measures["gguf"]["bytes"] == (out / "model-q8_0.gguf").stat().st_size
        and measures["gguf"]["from"] == "quantized"
    )


def test_compress_only_quantizes_a_model_that_fits(folders, tmp_path):
    recipe = replace(RECIPE, quantize="int4", gguf="f16", budget_share=1.0, problems=0)
    assert main(command(folders, recipe, tmp_path / "out")) == 0
    measures = json.loads((tmp_path / "out" / "lineage.json").read_text())["measures"]
    assert not (tmp_path / "out" / "distilled").exists() and list(measures["losses"]) == [
        "parent",
        "quantized",
    ]
    assert measures["gguf"]["from"] == "pruned" and format_in(load(tmp_path / "out")) == "int4"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The base model fits, so nothing was pruned" in page and "Skipped: the base model fits" in page


def test_compress_of_a_model_that_fits_is_the_model_itself(folders, tmp_path):
    recipe = replace(RECIPE, quantize=None, gguf=None, problems=0, budget_share=1.0)
    assert main(command(folders, recipe, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        folders / "parent" / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["measures"]["agreement"] == {
        "parent": 1.0
    }


def test_compress_evaluates_each_model_once_after_an_interruption(folders, result, tmp_path, monkeypatch):
    recipe, asked = replace(result[2], gguf="f16"), []

    def fake(_, llm, problems, thinking, label):
        if len(asked) == 2:
            asked.append("stop")
            raise InterruptedError
        asked.append(label.split()[0])
        share = sum(p.numel() for p in llm.model.parameters()) / 1e6
        one = {"accuracy": share, "low": share, "high": share, "problems": len(problems)}
        return one | {"families": {"sums": one}}

    def run():
        return compress(recipe, folders / "parent", folders / "sft", tmp_path / "out")

    monkeypatch.setattr(answers, "accuracy", fake)
    with pytest.raises(InterruptedError):
        run()
    measures = json.loads((run() / "lineage.json").read_text())["measures"]
    assert asked == ["parent", "pruned", "stop", "distilled", "quantized"]
    shares = {name: found["accuracy"] for name, found in measures["accuracy"].items()}
    assert (
        shares["parent"] > shares["pruned"] == shares["distilled"] > shares["quantized"]
    )  # each was its own checkpoint
    assert measures["gguf"]["from"] == "distilled"  # f16 holds more than int8 does


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int4"], "for int4 matrices give --quantize int4"),
        (["--quantize", "int5"], "known are int8, int4, fp8"),
        (["--quantize", "int8", "--dtype", "fp32"], "with dtype bf16"),
        (["--gguf", "q5_0"], "known are bf16"),
        (["--problems", "-1"], "give 0 or more"),
        (["--problems", "2", "--tasks", '["riddles"]'], "unknown task 'riddles'"),
    ],
)
def test_compress_refuses_before_any_work_what_would_stop_a_later_step(
    folders, tmp_path, capsys, flags, message
):
    assert main([*command(folders, CompressRecipe(), tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_compress_refuses_a_gguf_for_an_unknown_architecture_before_any_work(folders, tmp_path, capsys):
    save(make_model(vocab_size=269, rope_theta=10_000.0).float(), tmp_path / "rotary")
    assert (
        main(
            [
                "compress",
                str(tmp_path / "rotary"),
                "--gguf",
                "bf16",
                "--data",
                str(folders / "sft"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "llama.cpp has no architecture" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rotary"]


def test_decode_timer_times_layers_in_the_format_of_the_budget(monkeypatch):
    seen = []

    def fake(models, contexts, batch, rounds):
        seen.extend(model.dtype for model in models.values())
        return {name: [type("Row", (), {"quickest": 1.0})] for name in models}

    def prepare(model):
        seen.append(format_in(model))

    monkeypatch.setattr(latency_table, "decode_times", fake)
    monkeypatch.setattr(latency_table, "prepare", prepare)
    config = make_model(hidden_size=64).config
    for dtype in ("int4", "bf16"):
        assert latency_table.decode_timer(Budget(1, 64, dtype=dtype), torch.device("cpu"))(
            {"one": config}
        ) == {"one": 1e-3}
    assert seen == ["int4", torch.bfloat16, None, torch.bfloat16]
