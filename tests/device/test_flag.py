"""`--device`: the device that a command uses, and the error for one that is unavailable."""

from pathlib import Path

import pytest
import torch
from mock_cuda import mock_cuda_device
from test_stages_on_device import COMPRESS, EVALUATE, GRPO, PRETRAIN, SFT

from nanohybrid.cli.main import main
from nanohybrid.cli.model_flags import usable_device
from nanohybrid.stages.recipe import dump

STAGES = ["pretrain", "sft", "grpo", "prune", "distill", "compress", "quantize", "evaluate"]
DISTILL = COMPRESS.distill


def command(stage: str, parent: Path, data: Path, folder: Path) -> list[str]:
    """A stage's command line over the tiny models, without the flag."""
    recipes = {
        "pretrain": PRETRAIN,
        "sft": SFT,
        "grpo": GRPO,
        "distill": DISTILL,
        "compress": COMPRESS,
        "evaluate": EVALUATE,
    }
    inputs = {
        "pretrain": ["--data", data],
        "sft": ["--model", parent],
        "grpo": ["--model", parent],
        "prune": [
            parent,
            "--hidden-size",
            "24",
            "--calibration",
            data,
            "--num-calibration-samples",
            "4",
            "--max-calibration-length",
            "30",
        ],
        "distill": [parent, parent, "--data", data],
        "compress": [parent, "--data", data],
        "quantize": [
            parent,
            "--to",
            "int8",
            "--calibration",
            data,
            "--num-calibration-samples",
            "4",
            "--max-calibration-length",
            "30",
        ],
        "evaluate": [parent],
    }[stage]
    words = [*(["align"] if stage in ("sft", "grpo") else []), stage]
    if stage in recipes:
        (folder / "recipe.toml").write_text(dump(recipes[stage]))
        words += ["--recipe", str(folder / "recipe.toml")]
    return [*words, *map(str, inputs), "--out", str(folder / "out"), "--json"]


def flag(stage: str) -> str:
    return "--run-on" if stage == "compress" else "--device"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_uses_an_available_gpu_by_default(
    stage: str, parent: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    with mock_cuda_device() as count:
        assert main(command(stage, parent, data, tmp_path)) == 0
    assert count[0] > 0


@pytest.mark.parametrize("stage", ["pretrain", "quantize"])
def test_stage_with_device_cpu_does_not_use_the_gpu(
    stage: str, parent: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    with mock_cuda_device() as count:
        assert main([*command(stage, parent, data, tmp_path), flag(stage), "cpu"]) == 0
    assert count == [0]


@pytest.mark.parametrize("name", ["abacus", "meta"])
@pytest.mark.parametrize("stage", [*STAGES, "quickstart"])
def test_unusable_device_is_a_one_line_error(
    stage: str, name: str, parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        ["quickstart", "--out", str(tmp_path / "out")]
        if stage == "quickstart"
        else command(stage, parent, data, tmp_path)
    )
    assert main([*words, flag(stage), name]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"{flag(stage)} {name} cannot be used" in error
        and not (tmp_path / "out").exists()
    )


def test_compress_error_tells_target_device_from_run_on(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(parent), "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "which is --run-on" in error


def test_auto_device_is_an_available_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("auto") == "cpu"
    chosen: list[int] = []
    with mock_cuda_device():
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert (
            usable_device("auto") == "cuda"
            and usable_device("cpu") == "cpu"
            and usable_device("cuda:1") == "cuda:1"
        )
    assert chosen == [0, 1]  # kernels are launched on the current device
