"""Every stage with a model computes the same on a CUDA device as on the CPU, and mixes no tensors of both.

Losses, divergences and scores are compared, not weights: a real GPU sums in another order, and Adam turns the
last bit of a gradient into a whole step.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanohybrid.align import GrpoRecipe, SftRecipe, grpo, sft
from nanohybrid.align.chats import ChatShares
from nanohybrid.align.rollouts import SamplingConfig
from nanohybrid.checkpoint import load, load_config
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.compress.stage import compress
from nanohybrid.distill.hidden_state_loss import HiddenStateLossRecipe
from nanohybrid.distill.recipe import DistillRecipe
from nanohybrid.distill.stage import distill
from nanohybrid.errors import ConfigError
from nanohybrid.evaluate import EvaluateRecipe, evaluate
from nanohybrid.model import HybridLM
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.stage import PruneRecipe, prune
from nanohybrid.prune.target import Target
from nanohybrid.quantize.stage import QuantizeRecipe, quantize_stage
from nanohybrid.train import LoopConfig, PrecisionConfig, PretrainRecipe, pretrain
from nanohybrid.train import loop as loops

FP32, OFTEN = PrecisionConfig("fp32"), LoopConfig(snapshot_steps=1, log_steps=1)
PRETRAIN = PretrainRecipe(
    model={
        "pattern": "M*-",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "mamba_num_heads": 2,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
    },
    steps=3,
    batch_tokens=100,
    sequence_length=40,
    precision=FP32,
    loop=OFTEN,
    validation_batches=1,
)
SFT = SftRecipe(
    tasks=("running",),
    tokens=600,
    batch_tokens=300,
    sequence_length=100,
    shares=ChatShares(text=0.0),
    precision=FP32,
)
GRPO = GrpoRecipe(
    tasks=("running",),
    difficulties=(3,),
    rollout_steps=1,
    prompts=2,
    num_generations=2,
    steps_per_generation=2,
    beta=0.1,
    sampling=SamplingConfig(max_tokens=4),
    eval_problems=2,
)
DISTILL = DistillRecipe(
    tokens=200, batch_tokens=100, sequence_length=40, precision=FP32, measured_tokens=100, loop=OFTEN
)
COMPRESS = CompressRecipe(
    budget_share=0.6,
    context=32,
    num_calibration_samples=4,
    max_calibration_length=30,
    distill=replace(DISTILL, tokens=100),
    quantize="int8",
    tasks=("running",),
    grid=Grid(
        drop_layers=(0, 1),
        multiple=4,
        max_evaluated=2,
        fractions={"hidden_size": (1.0, 0.75), "intermediate_size": (1.0, 0.5), "mamba_head_dim": (1.0, 0.5)},
    ),
)
EVALUATE = EvaluateRecipe(
    tasks=("running",),
    problems=2,
    thinking_budgets=(2,),
    max_tokens=6,
    contexts=(8,),
    decode_batch=2,
    decode_rounds=1,
    held_out_tokens=60,
)


def measures(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "lineage.json").read_text())["measures"]
    return found


def same(stage: Callable[[Path, str], Path], gpu: str, folder: Path, *names: str) -> tuple[Path, Path]:
    """Run a stage on the CPU and on the device, compare the named measurements, and return both outputs."""
    outs = stage(folder / "here", "cpu"), stage(folder / "there", gpu)
    here, there = map(measures, outs)
    for name in names:
        assert there[name] == pytest.approx(here[name], rel=1e-2, abs=1e-6), name
    return outs


def test_a_seed_gives_the_same_weights_on_every_device(gpu: str, parent: Path) -> None:
    config = load_config(parent)
    with torch.device(gpu):
        there = HybridLM(config, seed=3)
    for (name, wanted), found in zip(
        HybridLM(config, seed=3).state_dict().items(), there.state_dict().values(), strict=True
    ):
        assert found.device.type == "cuda" and torch.equal(found.cpu(), wanted), name


def test_pretrain_on_cuda_equals_cpu(gpu: str, data: Path, tmp_path: Path) -> None:
    outs = same(
        lambda out, device: pretrain(PRETRAIN, data, out, device),
        gpu,
        tmp_path,
        "final_loss",
        "validation_loss",
        "parameters",
    )
    assert (outs[0] / "recipe.toml").read_text() == (outs[1] / "recipe.toml").read_text()
    records = [json.loads((out / "lineage.json").read_text()) for out in outs]
    assert [record["made_with"]["device"] for record in records] == ["cpu", gpu]
    assert (
        "cores and cuda (" in (outs[1] / "report.html").read_text()
        and "and cpu" not in (outs[0] / "report.html").read_text()
    )


def test_pretrain_resumes_on_another_device(
    gpu: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(PRETRAIN, data, tmp_path / "whole")
    step = loops.TrainingRun.train_step
    for stop, device in ((1, "cpu"), (2, gpu)):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):

            def dying(run: loops.TrainingRun, *rest: Any, stop: int = stop) -> Any:
                if run.state.step == stop:
                    raise InterruptedError
                return step(run, *rest)

            patch.setattr(loops.TrainingRun, "train_step", dying)
            pretrain(PRETRAIN, data, tmp_path / "parts", device)
    parts = pretrain(PRETRAIN, data, tmp_path / "parts")
    assert measures(parts)["final_loss"] == pytest.approx(measures(whole)["final_loss"], rel=1e-3)


def test_model_larger_than_the_device_is_refused(
    gpu: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["nanohybrid.train.pretrain"]  # the package has a function of this name
    monkeypatch.setattr(module, "memory_of", lambda device: 2**20 if device == gpu else 2**40)
    with pytest.raises(ConfigError, match="; cuda has 0 GiB"):
        pretrain(PRETRAIN, data, tmp_path / "out", gpu)


def test_align_on_cuda_equals_cpu(
    gpu: str, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same(lambda out, device: sft(SFT, parent, out, device=device), gpu, tmp_path / "sft", "final_loss")
    monkeypatch.setattr(
        "nanohybrid.align.rollouts.reward", lambda problem, completion: float(completion.token_ids[0] % 2)
    )
    here, there = same(
        lambda out, device: grpo(GRPO, parent, out, device), gpu, tmp_path / "grpo", "accuracy_before"
    )
    assert (there / "metrics" / "rollouts.jsonl").read_text() == (
        here / "metrics" / "rollouts.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": "offloaded"},
        {"teacher": "int8"},
        {"teacher": "int4", "train_on_prompt": True},
        {"top_k": 8},
        {"top_k": 8, "teacher": "offloaded", "train_on_prompt": True},
        {"hidden_state_loss": HiddenStateLossRecipe(0.5, (0, 2))},
        {"hidden_state_loss": HiddenStateLossRecipe(0.5, kind="cosine"), "teacher": "offloaded"},
    ],
    ids=["beside", "offloaded", "int8", "int4", "top-k", "top-k-offloaded", "between", "between-offloaded"],
)
def test_distill_on_cuda_equals_cpu(
    gpu: str, parent: Path, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    student = prune(PruneRecipe(Target(drop_layers=(1,))), parent, tmp_path / "student")
    recipe = replace(DISTILL, **changes)
    names = [
        "kl_before",
        "kl_after",
        *(["hidden_state_loss_before", "hidden_state_loss_after"] if "hidden_state_loss" in changes else []),
    ]
    same(
        lambda out, device: distill(recipe, student, parent, data, out, device=device), gpu, tmp_path, *names
    )


@pytest.mark.parametrize("stream", [False, True])
def test_compress_on_cuda_equals_cpu(
    gpu: str, parent: Path, data: Path, tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanohybrid.evaluate.accuracy.EvaluateRecipe", partial(EvaluateRecipe, max_tokens=6))
    recipe = replace(COMPRESS, stream=stream, problems=1 - stream)
    outs = same(
        lambda out, device: compress(recipe, parent, data, out, run_on=device),
        gpu,
        tmp_path,
        "losses",
        "agreement",
    )
    assert (outs[0] / "pruning_mask.json").read_text() == (outs[1] / "pruning_mask.json").read_text()
    first, second = (Importance.load(out / "importance") for out in outs)
    torch.testing.assert_close(second.hidden_size, first.hidden_size, rtol=1e-3, atol=1e-5)
    assert (
        load(outs[1]).device.type == "cpu"
        and measures(outs[1])["inference"]["result"]["tokens_per_second"] > 0
    )


def test_compress_measures_speed_on_its_device(
    gpu: str, parent: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = replace(
        COMPRESS,
        speed="measured",
        quantize=None,
        grid=replace(COMPRESS.grid, drop_layers=(0,), max_evaluated=1),
    )
    compress(recipe, parent, data, tmp_path / "out", run_on=gpu)
    tables = list((tmp_path / "cache" / "nanohybrid" / "latency").iterdir())
    assert len(tables) == 1 and "cpu" not in tables[0].name


def test_dense_model_stages_on_cuda_equal_cpu(gpu: str, dense: Path, data: Path, tmp_path: Path) -> None:
    same(lambda out, device: sft(SFT, dense, out, device=device), gpu, tmp_path / "sft", "final_loss")
    blocks = replace(COMPRESS.grid, drop_layers=(0, 2))  # a dense model loses attention with its MLP
    recipe = replace(COMPRESS, quantize=None, budget_share=0.8, grid=blocks)
    same(
        lambda out, device: compress(recipe, dense, data, out, run_on=device),
        gpu,
        tmp_path / "compress",
        "losses",
        "agreement",
    )


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_quantize_on_cuda_equals_cpu(gpu: str, parent: Path, data: Path, tmp_path: Path, format: str) -> None:
    names = ["perplexity_before", "perplexity_after", "kl_divergence", "weight_error"]
    stage = QuantizeRecipe(format, num_calibration_samples=4, max_calibration_length=30)
    same(lambda out, device: quantize_stage(stage, parent, out, data, device), gpu, tmp_path, *names)


@pytest.mark.parametrize("how", ["iterative", "one-shot", "cosine"])
def test_prune_by_measured_scores_on_cuda_equals_cpu(
    gpu: str, parent: Path, data: Path, tmp_path: Path, how: str
) -> None:
    recipe = PruneRecipe(
        Target(layers=4, sizes={"hidden_size": 24}),
        num_calibration_samples=4,
        max_calibration_length=30,
        depth_importance=how,
    )
    outs = same(lambda out, device: prune(recipe, parent, out, None, data, device), gpu, tmp_path)
    assert (outs[0] / "pruning_mask.json").read_text() == (outs[1] / "pruning_mask.json").read_text()


def test_evaluate_on_cuda_equals_cpu(gpu: str, parent: Path, data: Path, tmp_path: Path) -> None:
    outs = same(lambda out, device: evaluate(EVALUATE, {"parent": parent}, out, data, device), gpu, tmp_path)
    first, second = (json.loads((out / "summary.json").read_text()) for out in outs)
    assert first["accuracy"] == second["accuracy"]
    found = [summary["models"]["parent"]["loss.validation-text"]["loss"] for summary in (first, second)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
