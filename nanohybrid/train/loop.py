"""The one training loop: pretraining, SFT and distillation are this with other batches and another loss.

A step is: batch, loss, gradient, clip, update. What surrounds it: the schedule, the precision and activation checkpointing applied
from outside, snapshots, the log, and a clean stop on Ctrl-C. `batches(step)` must be a function of the step alone; then a run that
was killed and resumed makes the same updates, bit for bit, as one that was not.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from nanohybrid.errors import ConfigError, InputError
from nanohybrid.ops.layout import Layout
from nanohybrid.stages import Stage, progress
from nanohybrid.train import training_state as snapshot
from nanohybrid.train.checkpointing import checkpointed
from nanohybrid.train.optimizer import OptimizerConfig, adamw, clip_gradient, set_learning_rate
from nanohybrid.train.precision import Mode, PrecisionConfig, autocast, fp8_linears
from nanohybrid.train.schedule import ScheduleConfig, factor
from nanohybrid.train.training_state import Position

LATELY = 0.9  # weight of the past in the running average of the loss


class Ragged(Protocol):
    """A batch: anything laid out end to end that can go to a device."""

    @property
    def layout(self) -> Layout: ...

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=Ragged)


@dataclass(frozen=True)
class LoopConfig:
    """How a run is kept and watched; nothing here changes its result."""

    snapshot_seconds: float = 60.0
    """Seconds between snapshots."""
    snapshot_steps: int = 0
    """Steps between snapshots instead, where it is not 0."""
    log_steps: int = 10
    """Steps between lines of the log."""
    checkpoint_every: int = 0
    """Recompute the activations of every so many layers in backward, to save memory; 0 keeps them all."""
    compile: bool = False
    """Compile the forward with torch.compile. On a CPU this takes a minute and gains nothing."""

    def __post_init__(self) -> None:
        if self.log_steps < 1 or not self.snapshot_seconds > 0:
            raise ConfigError("loop: log_steps and snapshot_seconds must be positive")
        if min(self.snapshot_steps, self.checkpoint_every) < 0:
            raise ConfigError("loop: snapshot_steps and checkpoint_every must not be negative")


class Training(Protocol):
    """What a recipe says about how its model is trained; the recipes of pretraining, SFT, GRPO and distillation all do."""

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
    recipe: Training,
    *,
    steps: int,
    stage: Stage,
    unit_steps: int = 1,
    name: str = "train",
) -> Position:
    """Train `model` in place for `steps` steps, or what is left of them where the stage holds a snapshot.

    `loss` gives the sum over a batch and the number of terms in it. The series `name` of the stage's log gets step, loss,
    gradient norm, learning rate, tokens and tokens per second. Snapshots, and so stops, come only after multiples of
    `unit_steps` steps: those whose batches were made together.
    """
    return Run(model, batches, loss, recipe, steps, stage, unit_steps, name).to_the_end()


class Run:
    """One run of the loop: its configuration and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], B],
        loss: Callable[[Any, B], tuple[Tensor, int]],
        recipe: Training,
        steps: int,
        stage: Stage,
        unit_steps: int,
        name: str,
    ) -> None:
        self.model, self.batches, self.loss, self.steps = model, batches, loss, steps
        self.config, self.schedule, self.precision, self.loop = (
            recipe.optimizer,
            recipe.schedule,
            recipe.precision,
            recipe.loop,
        )
        self.stage, self.unit_steps, self.name = stage, unit_steps, name
        self.device = next(model.parameters()).device
        self.layers: nn.ModuleList = model.backbone.layers  # type: ignore[assignment,union-attr]
        self.optimizer = adamw(model, self.config)
        self.position = snapshot.load(stage.directory, model, self.optimizer) or Position()
        stage.rewind(name, step=self.position.step + 1)
        self.saved_at, self.saved_step = time.monotonic(), self.position.step
        self.logged_at, self.logged_tokens = time.monotonic(), self.position.tokens

    def to_the_end(self) -> Position:
        """Every step that is left, in spans of one precision."""
        self.model.train()
        with stop_requests() as stopping, progress(self.name, self.steps, "steps", self.position.step) as bar:
            while self.position.step < self.steps:
                mode = self.precision.mode_at(self.position.step, self.steps)
                with ExitStack() as applied:
                    if mode == "fp8":
                        applied.enter_context(fp8_linears(self.layers, self.precision.bf16_layers))
                    applied.enter_context(checkpointed(self.layers, self.loop.checkpoint_every))
                    forward = torch.compile(self.loss) if self.loop.compile else self.loss
                    while (
                        self.position.step < self.steps
                        and self.precision.mode_at(self.position.step, self.steps) == mode
                    ):
                        values = self.one_step(forward, mode)
                        bar.advance(1, **values)
                        self.keep(stop=bool(stopping))
        self.model.eval()
        return self.position

    def one_step(self, forward: Callable[[Any, Any], tuple[Tensor, int]], mode: Mode) -> dict[str, Any]:
        """Batch, loss, gradient, clip, update."""
        step = self.position.step
        batch = self.batches(step).to(self.device)
        self.optimizer.zero_grad(
            set_to_none=True
        )  # before the forward, whose activations take the place of the last step's gradients
        with autocast(mode, self.device):
            total, count = forward(self.model, batch)
        mean = total / max(count, 1)
        mean.backward()
        norm = clip_gradient(self.model, self.config.clip)
        value, length = mean.item(), norm.item()
        self.refuse_what_is_not_finite(value, length)
        rate = self.config.learning_rate * factor(self.schedule, step, self.steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        lately = value if step == 0 else LATELY * self.position.loss + (1 - LATELY) * value
        self.position = Position(step + 1, self.position.tokens + batch.layout.tokens, lately)
        self.stage.spend(tokens=batch.layout.tokens)
        return {"loss": lately, "tok/s": self.log(value, length, rate)}

    def refuse_what_is_not_finite(self, loss: float, norm: float) -> None:
        """Stop before a step that would put NaN into the weights; the last snapshot is still good."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            mend = "use a lower learning_rate, a longer warmup, or precision fp32"
            raise InputError(f"{self.name}: {what} at step {self.position.step}; {mend}")

    def log(self, loss: float, norm: float, rate: float) -> int:
        """Write a line of the log where one is due; returns the tokens per second since the last."""
        now = time.monotonic()
        speed = round((self.position.tokens - self.logged_tokens) / max(now - self.logged_at, 1e-9))
        if self.position.step % self.loop.log_steps == 0 or self.position.step == self.steps:
            done = {"step": self.position.step, "tokens": self.position.tokens}
            self.stage.log(
                self.name, **done, loss=loss, gradient_norm=norm, learning_rate=rate, tokens_per_second=speed
            )
            self.logged_at, self.logged_tokens = now, self.position.tokens
        return speed

    def keep(self, stop: bool) -> None:
        """Write a snapshot where one is due: by steps, by the clock, at the end, or before stopping."""
        at_end = self.position.step == self.steps
        if not at_end and self.position.step % self.unit_steps:
            return
        if at_end or stop or self.snapshot_is_due():
            snapshot.save(self.stage.directory, self.model, self.optimizer, self.position)
            self.saved_at, self.saved_step = time.monotonic(), self.position.step
        if stop:
            raise KeyboardInterrupt

    def snapshot_is_due(self) -> bool:
        """By the number of steps where the configuration gives one, else by the clock."""
        if self.loop.snapshot_steps:
            return self.position.step - self.saved_step >= self.loop.snapshot_steps
        return time.monotonic() - self.saved_at >= self.loop.snapshot_seconds


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that gets an entry when the user presses Ctrl-C or the system asks to end; a second Ctrl-C interrupts at once.

    An exception in the middle of an update would leave weights half stepped, so the request waits for the end of the step.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
