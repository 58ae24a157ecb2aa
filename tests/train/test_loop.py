"""fit: it lowers the loss, stops cleanly, resumes bit for bit, and refuses NaN."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.model import HybridLM
from nanohybrid.stages import Stage, open_stage
from nanohybrid.train import (
    LoopConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    fit,
    mean_loss,
    next_token_loss,
)
from nanohybrid.train.training_state import NAME, TrainState

Batches = Callable[[int], Batch]


@dataclass(frozen=True)
class Recipe:
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-2))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig("fp32"))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(log_steps=2))


def train(model: HybridLM, batches: Batches, stage: Stage, steps: int = 8, **changes: Any) -> TrainState:
    settings = {
        name: changes.pop(name) for name in ("optimizer", "schedule", "precision", "loop") if name in changes
    }
    return fit(
        model,
        batches,
        recipe=Recipe(**settings),
        steps=steps,
        stage=stage,
        **({"loss": next_token_loss} | changes),
    )


def uninterrupted(config: HybridConfig, batches: Batches, out: Path, **changes: Any) -> dict[str, Tensor]:
    model = HybridLM(config, seed=0)
    with open_stage(out, "test", LoopConfig()) as stage:
        train(model, batches, stage, **changes)
    return model.state_dict()


def test_fit_lowers_the_loss_and_logs_every_log_steps(
    config: HybridConfig, batches: Batches, tmp_path: Path
) -> None:
    model = HybridLM(config, seed=0)
    before = mean_loss(model, [batches(1000)])
    with open_stage(tmp_path / "out", "test", LoopConfig()) as stage:
        state = train(model, batches, stage, steps=40, precision=PrecisionConfig("bf16"))
        rows = stage.series("train")
    assert mean_loss(model, [batches(1000)]) < before - 0.5
    assert [row["step"] for row in rows] == list(range(2, 41, 2)) and state == TrainState(
        40, 40 * 64, state.loss_ema
    )
    assert rows[-1]["tokens"] == 40 * 64 and rows[-1]["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "precision", [PrecisionConfig("fp32"), PrecisionConfig("fp8", bf16_layers=1, fp8_until=0.5)]
)
def test_fit_resumes_bit_for_bit_after_ctrl_c(
    config: HybridConfig, batches: Batches, tmp_path: Path, precision: PrecisionConfig
) -> None:
    expected = uninterrupted(config, batches, tmp_path / "whole", precision=precision)

    def interrupted(step: int) -> Batch:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    for attempt in (interrupted, batches):
        model = HybridLM(config, seed=0)
        try:
            with open_stage(tmp_path / "out", "test", LoopConfig()) as stage:
                train(model, attempt, stage, precision=precision)
                rows = stage.series("train")
        except KeyboardInterrupt:
            assert attempt is interrupted and (tmp_path / "out.partial" / NAME).exists()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


def test_fit_repeats_and_logs_the_steps_after_the_last_snapshot(
    config: HybridConfig, batches: Batches, tmp_path: Path
) -> None:
    expected = uninterrupted(config, batches, tmp_path / "whole")

    def failing(step: int) -> Batch:
        if step == 5:
            raise OSError("the disk is gone")
        return batches(step)

    for attempt in (failing, batches):
        model = HybridLM(config, seed=0)
        try:
            with open_stage(tmp_path / "out", "test", LoopConfig()) as stage:
                train(model, attempt, stage, loop=LoopConfig(log_steps=1, snapshot_steps=3))
                rows = stage.series("train")
        except OSError:
            assert attempt is failing
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_fit_stops_before_a_nan_loss_reaches_the_weights(
    config: HybridConfig, batches: Batches, tmp_path: Path
) -> None:
    model = HybridLM(config, seed=0)
    seen = []

    def loss(model: HybridLM, batch: Batch) -> tuple[Tensor, int]:
        total, count = next_token_loss(model, batch)
        seen.append(count)
        return (total * float("nan") if len(seen) == 3 else total), count

    message = "loss is nan at step 2; use a lower learning_rate"
    with (
        pytest.raises(InputError, match=message),
        open_stage(tmp_path / "out", "test", LoopConfig()) as stage,
    ):
        train(model, batches, stage, loss=loss)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_fit_refuses_a_snapshot_that_is_damaged_of_another_model_or_of_an_older_version(
    config: HybridConfig, batches: Batches, tmp_path: Path
) -> None:
    with open_stage(tmp_path / "out", "test", LoopConfig()) as stage:
        train(HybridLM(config, seed=0), batches, stage, steps=1)
        with pytest.raises(CheckpointError, match="does not fit this run"):
            train(HybridLM(config.replace(hidden_size=48), seed=0), batches, stage, steps=2)
        save_file({}, stage.directory / NAME, metadata={"position": '{"step": 1, "tokens": 64, "loss": 2.0}'})
        with pytest.raises(
            CheckpointError, match=r"was written by an older version.*; remove .* to start over"
        ):
            train(HybridLM(config, seed=0), batches, stage, steps=2)
        (stage.directory / NAME).write_bytes(b"cut")
        with pytest.raises(CheckpointError, match="does not fit this run"):
            train(HybridLM(config, seed=0), batches, stage, steps=2)
