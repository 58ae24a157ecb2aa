"""Check that an interrupted and resumed training run equals an uninterrupted one."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.stages import open_stage
from nanohybrid.train import (
    LoopConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    fit,
    next_token_loss,
)
from nanohybrid.verify.model_under_test import ModelUnderTest
from nanohybrid.verify.result import CheckResult
from nanohybrid.verify.small import small_model

KILLED_AT = 2
DOCUMENTS = (30, 7, 41)


@dataclass(frozen=True)
class ShortRun:
    """A few training steps, with a snapshot after each."""

    steps: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    loop: LoopConfig


RUN = ShortRun(4, OptimizerConfig(), ScheduleConfig(), PrecisionConfig("fp32"), LoopConfig(snapshot_steps=1))


class Interrupted(Exception):
    """Simulates a kill in the middle of a step."""


def resumed_equals_uninterrupted(subject: ModelUnderTest) -> CheckResult:
    """A few training steps of a small copy: uninterrupted, and killed and resumed from the snapshot."""
    config = subject.model.config
    whole, first, second = (
        small_model(config),
        small_model(config),
        small_model(config, seed=1),
    )  # the snapshot replaces the weights of the other seed
    batches = _batches(whole.config.vocab_size)

    def dying(step: int) -> Batch:
        if step == KILLED_AT:
            raise Interrupted
        return batches(step)

    with tempfile.TemporaryDirectory(prefix="nanohybrid-verify-") as directory:
        _train(whole, batches, Path(directory) / "whole")
        try:
            _train(first, dying, Path(directory) / "killed")
        except Interrupted:
            _train(second, batches, Path(directory) / "killed")
    differences = [
        (a - b).abs().max().item() for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    ]
    return CheckResult(
        "resume == uninterrupted",
        f"a small copy: {RUN.steps} steps, killed at {KILLED_AT}",
        max(differences),
        0.0,
    )


def _train(model: HybridLM, batches: Callable[[int], Batch], out: Path) -> None:
    with open_stage(out, "verify", RUN) as stage:
        fit(model, batches, next_token_loss, RUN, steps=RUN.steps, stage=stage, name="verify")


def _batches(vocab_size: int) -> Callable[[int], Batch]:
    """Random documents: a function of the step."""

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        documents = [
            torch.randint(vocab_size, (length,), generator=generator).tolist() for length in DOCUMENTS
        ]
        return Batch.of((tokens, [1] * len(tokens)) for tokens in documents)

    return batch
