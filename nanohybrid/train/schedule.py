"""The learning-rate schedule: warmup, stable, decay (WSD; Hu et al. 2024; paper, section 2). Pure functions
of the step.

The stable part does not depend on the length of the run, so a run can be continued from any step before its
decay.
"""

from dataclasses import dataclass
from typing import ClassVar

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule: warmup, stable, decay; each part as a fraction of all steps."""

    RENAMED: ClassVar[dict[str, str]] = {"final": "min_lr_ratio"}

    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0 to its peak."""
    decay: float = 0.3
    """Fraction of the steps, at the end, over which it falls linearly to `min_lr_ratio`."""
    min_lr_ratio: float = 0.01
    """Learning rate after the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ConfigError(
                f"schedule: warmup {self.warmup} and decay {self.decay} must be from 0 to 1, and together at "
                "most 1"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"schedule: min_lr_ratio is {self.min_lr_ratio}; it must be from 0 to 1")


def lr_multiplier(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (counted from 0) of `steps`, as a fraction of the peak."""
    warmup_steps, decay_steps = schedule.warmup * steps, schedule.decay * steps
    if step + 1 < warmup_steps:
        return (step + 1) / warmup_steps
    steps_left = steps - step - 1
    if steps_left < decay_steps:
        return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * steps_left / decay_steps
    return 1.0
