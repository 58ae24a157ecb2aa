"""The stage `pretrain`: token stores in, a checkpoint out; a killed run resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanohybrid.checkpoint import load
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.stages.recipe import dump
from nanohybrid.text import Tokenizer
from nanohybrid.train import LoopConfig, OptimizerConfig, PretrainRecipe, pretrain
from nanohybrid.train.training_state import NAME


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load(directory).state_dict()


def test_pretrain_writes_checkpoint_tokenizer_recipe_and_measures(
    recipe: PretrainRecipe, data: Path, tmp_path: Path
) -> None:
    out = pretrain(recipe, data, tmp_path / "base")
    model, tokenizer = load(out), Tokenizer.from_directory(out)
    assert model.config.vocab_size == tokenizer.vocab_size and model.config.eos_token_id == tokenizer.eos_id
    measures = json.loads((out / "lineage.json").read_text())["measures"]
    assert measures["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        0 < measures["validation_loss"] < 10 and (out / "recipe.toml").exists() and not (out / NAME).exists()
    )
    pretrain(replace(recipe, phases=(), steps=1), data, tmp_path / "mixture of the data")
    assert pretrain(recipe, data, tmp_path / "base") == out  # done already: nothing is redone


def test_pretrain_killed_and_resumed_equals_an_uninterrupted_run(
    recipe: PretrainRecipe, data: Path, tmp_path: Path
) -> None:
    longer = replace(recipe, steps=30)
    expected = weights(pretrain(longer, data, tmp_path / "whole"))
    out = tmp_path / "killed"
    (tmp_path / "recipe.toml").write_text(dump(longer))
    command = [
        sys.executable,
        "-m",
        "nanohybrid",
        "pretrain",
        "--recipe",
        tmp_path / "recipe.toml",
        "--data",
        data,
        "--out",
        out,
    ]
    process = subprocess.Popen(list(map(str, command)))
    log = tmp_path / "killed.partial" / "metrics" / "pretrain.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    got = weights(pretrain(longer, data, out))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_pretrain_refuses_bad_recipes_and_data_in_one_line(
    recipe: PretrainRecipe, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        PretrainRecipe(steps=0)
    with pytest.raises(ConfigError, match="its keys are the fields"):
        pretrain(replace(recipe, model={"pattern": "M-", "color": 1}), data, tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a corpus"):
        pretrain(recipe, tmp_path / "empty", tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LoopConfig, {"log_steps": 0}), (LoopConfig, {"snapshot_steps": -1}),
        (LoopConfig, {"snapshot_seconds": float("nan")}), (LoopConfig, {"activation_checkpoint_every": -1}),
        (OptimizerConfig, {"beta1": 1.0}), (OptimizerConfig, {"beta2": -0.1}),
        (OptimizerConfig, {"epsilon": 0.0}), (OptimizerConfig, {"learning_rate": float("nan")}),
        (PretrainRecipe, {"validation_batches": -1}),
    ],
)  # fmt: skip
def test_training_recipes_refuse_settings_out_of_range(kind: type, values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        kind(**values)


def test_pretrain_without_validation_batches_measures_no_validation_loss(
    recipe: PretrainRecipe, data: Path, tmp_path: Path
) -> None:
    out = pretrain(replace(recipe, steps=1, validation_batches=0), data, tmp_path / "base")
    assert "validation_loss" not in json.loads((out / "lineage.json").read_text())["measures"]


def test_pretrain_refuses_a_model_that_does_not_fit_the_memory(
    recipe: PretrainRecipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["nanohybrid.train.pretrain"], "machine_memory_bytes", lambda: 24 * 2**30)
    with pytest.raises(
        ConfigError, match=r"GiB for weights, gradients and optimizer states, .*; this machine has 24 GiB"
    ):
        pretrain(replace(recipe, model="nano-12b-v2"), data, tmp_path / "base")
    assert not any(tmp_path.iterdir())
