"""The training loop of pretraining, SFT, GRPO and distillation. They differ in their batches and their loss.

A step draws a batch, computes the loss and the gradient, clips the gradient and updates the weights. The loop
adds the learning-rate schedule, precision, activation checkpointing, snapshots, the log and a clean stop on
Ctrl-C. `batches(step)` must depend on the step alone; then a run that was killed and resumed makes the same
updates, bit for bit, as an uninterrupted run.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from nanohybrid.errors import ConfigError, InputError
from nanohybrid.ops.layout import Layout
from nanohybrid.stages import Stage, progress
from nanohybrid.train import training_state
from nanohybrid.train.checkpointing import checkpointed
from nanohybrid.train.optimizer import OptimizerConfig, adamw, clip_grad_norm, set_learning_rate
from nanohybrid.train.precision import Mode, PrecisionConfig, autocast, fp8_linears
from nanohybrid.train.schedule import ScheduleConfig, lr_multiplier
from nanohybrid.train.training_state import TrainState

EMA_DECAY = 0.9  # of the moving average of the loss


class PackedBatch(Protocol):
    """A batch of sequences laid end to end, which can be moved to a device."""

    @property
    def layout(self) -> Layout: ...

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=PackedBatch)


@dataclass(frozen=True)
class LoopConfig:
    """Snapshots, logging and memory; none of these changes the result of a run."""

    RENAMED: ClassVar[dict[str, str]] = {"checkpoint_every": "activation_checkpoint_every"}

    snapshot_seconds: float = 60.0
    """Seconds between snapshots."""
    snapshot_steps: int = 0
    """Steps between snapshots; 0 goes by snapshot_seconds."""
    log_steps: int = 10
    """Steps between rows of the log."""
    activation_checkpoint_every: int = 0
    """Recompute the activations of every n-th layer in the backward pass, to save memory; 0 saves all
    activations."""
    compile: bool = False
    """Compile the forward pass with torch.compile. On a CPU this takes a minute and gains no speed."""

    def __post_init__(self) -> None:
        if self.log_steps < 1 or not self.snapshot_seconds > 0:
            raise ConfigError("loop: log_steps and snapshot_seconds must be positive")
        if min(self.snapshot_steps, self.activation_checkpoint_every) < 0:
            raise ConfigError("loop: snapshot_steps and activation_checkpoint_every must not be negative")


class TrainingRecipe(Protocol):
    """The settings of a recipe that the loop reads.

    The recipes of pretraining, SFT, GRPO and distillation have them.
    """

    @property
    def optimizer(self) -> OptimizerConfig: ...

    @property
    def schedule(self) -> ScheduleConfig: ...

    @property
    def precision(self) -> PrecisionConfig: ...

    @property
    def loop(self) -> LoopConfig: ...


def fit(
    model: nn.Module,
    batches: Callable[[int], B],
    loss: Callable[[Any, B], tuple[Tensor, int]],
    recipe: TrainingRecipe,
    *,
    steps: int,
    stage: Stage,
    steps_per_unit: int = 1,
    name: str = "train",
) -> TrainState:
    """Train `model` in place up to step `steps`; a snapshot in the stage's directory is resumed. Returns the
    final state.

    batches         step -> batch
    loss            (model, batch) -> sum of the loss over the batch, and the number of its terms
    steps_per_unit  steps whose batches were made together: snapshots and stops come only after multiples of
                    it
    name            series of the stage's log, with step, loss, gradient norm, learning rate, tokens and
                    tokens per second

    Raises InputError where the loss or the gradient norm is not finite, KeyboardInterrupt after Ctrl-C or
    SIGTERM (with a snapshot written), and CheckpointError for a snapshot that does not fit the model.
    """
    return TrainingRun(model, batches, loss, recipe, steps, stage, steps_per_unit, name).run()


class TrainingRun:
    """One run of the loop: its settings and its state."""

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], B],
        loss: Callable[[Any, B], tuple[Tensor, int]],
        recipe: TrainingRecipe,
        steps: int,
        stage: Stage,
        steps_per_unit: int,
        name: str,
    ) -> None:
        self.model, self.batches, self.loss, self.steps = model, batches, loss, steps
        self.config, self.schedule, self.precision, self.loop = (
            recipe.optimizer,
            recipe.schedule,
            recipe.precision,
            recipe.loop,
        )
        self.stage, self.steps_per_unit, self.name = stage, steps_per_unit, name
        self.device = next(model.parameters()).device
        self.layers: nn.ModuleList = model.backbone.layers  # type: ignore[assignment,union-attr]
        self.optimizer = adamw(model, self.config)
        self.state = training_state.load(stage.directory, model, self.optimizer) or TrainState()
        stage.rewind(name, step=self.state.step + 1)
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
        self.logged_at, self.logged_tokens = time.monotonic(), self.state.tokens

    def run(self) -> TrainState:
        """Do the remaining steps. Consecutive steps of one precision share one set of patched layers."""
        self.model.train()
        with stop_requests() as stopping, progress(self.name, self.steps, "steps", self.state.step) as bar:
            while self.state.step < self.steps:
                mode = self.precision.mode_at(self.state.step, self.steps)
                with ExitStack() as applied:
                    if mode == "fp8":
                        applied.enter_context(fp8_linears(self.layers, self.precision.bf16_layers))
                    applied.enter_context(checkpointed(self.layers, self.loop.activation_checkpoint_every))
                    forward = torch.compile(self.loss) if self.loop.compile else self.loss
                    while (
                        self.state.step < self.steps
                        and self.precision.mode_at(self.state.step, self.steps) == mode
                    ):
                        values = self.train_step(forward, mode)
                        bar.advance(1, **values)
                        self.maybe_checkpoint(stop=bool(stopping))
        self.model.eval()
        return self.state

    def train_step(self, forward: Callable[[Any, Any], tuple[Tensor, int]], mode: Mode) -> dict[str, Any]:
        """One update of the weights. Returns the values that the progress bar shows."""
        step = self.state.step
        batch = self.batches(step).to(self.device)
        # Before the forward pass: its activations can then use the memory of the last gradients.
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(mode, self.device):
            total, count = forward(self.model, batch)
        mean = total / max(count, 1)
        mean.backward()
        norm = clip_grad_norm(self.model, self.config.max_grad_norm)
        loss, gradient_norm = mean.item(), norm.item()
        self.check_finite(loss, gradient_norm)
        learning_rate = self.config.learning_rate * lr_multiplier(self.schedule, step, self.steps)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        loss_ema = loss if step == 0 else EMA_DECAY * self.state.loss_ema + (1 - EMA_DECAY) * loss
        self.state = TrainState(step + 1, self.state.tokens + batch.layout.tokens, loss_ema)
        self.stage.spend(tokens=batch.layout.tokens)
        return {"loss": loss_ema, "tok/s": self.log(loss, gradient_norm, learning_rate)}

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise InputError before an update that would write NaN into the weights; the last snapshot stays
        usable."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            fix = "use a lower learning_rate, a longer warmup, or precision fp32"
            raise InputError(f"{self.name}: {what} at step {self.state.step}; {fix}")

    def log(self, loss: float, norm: float, learning_rate: float) -> int:
        """Write a row of the log every `log_steps` steps.

        Returns the tokens per second since the last row.
        """
        now = time.monotonic()
        speed = round((self.state.tokens - self.logged_tokens) / max(now - self.logged_at, 1e-9))
        if self.state.step % self.loop.log_steps == 0 or self.state.step == self.steps:
            done = {"step": self.state.step, "tokens": self.state.tokens}
            self.stage.log(
                self.name,
                **done,
                loss=loss,
                gradient_norm=norm,
                learning_rate=learning_rate,
                tokens_per_second=speed,
            )
            self.logged_at, self.logged_tokens = now, self.state.tokens
        return speed

    def maybe_checkpoint(self, stop: bool) -> None:
        """Write a snapshot if one is due, at the last step, and before a stop.

        Raises KeyboardInterrupt for a stop.
        """
        is_last = self.state.step == self.steps
        if not is_last and self.state.step % self.steps_per_unit:
            return
        if is_last or stop or self.snapshot_is_due():
            training_state.save(self.stage.directory, self.model, self.optimizer, self.state)
            self.saved_at, self.saved_step = time.monotonic(), self.state.step
        if stop:
            raise KeyboardInterrupt

    def snapshot_is_due(self) -> bool:
        """Whether `snapshot_steps` steps have passed since the last snapshot, or `snapshot_seconds` where
        that is 0."""
        if self.loop.snapshot_steps:
            return self.state.step - self.saved_step >= self.loop.snapshot_steps
        return time.monotonic() - self.saved_at >= self.loop.snapshot_seconds


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives the signal number on Ctrl-C or SIGTERM. A second Ctrl-C raises KeyboardInterrupt
    at once.

    An exception in the middle of an update would leave the weights partly updated, so the first signal waits
    for the end of the step. Outside the main thread, where Python delivers no signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
