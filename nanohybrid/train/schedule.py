"""The learning rate over a run: warm-up, stable, decay (WSD). Pure functions of the step.

The stable part needs no known end: a run can be prolonged from any point before its decay, and much of a run's gain comes in
the decay itself.
"""

from dataclasses import dataclass

from nanohybrid.errors import ConfigError


@dataclass(frozen=True)
class ScheduleConfig:
    """Parts of a run as fractions of its steps, and the learning rate at its end as a fraction of the peak."""

    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly from nothing to its peak."""
    decay: float = 0.3
    """Share of the steps, at the end, over which it falls linearly to `final`."""
    final: float = 0.01
    """The rate after the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ConfigError(
                f"schedule: warmup {self.warmup} and decay {self.decay} must be from 0 to 1, and together at most 1"
            )
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule: final is {self.final}, it is a fraction of the peak: from 0 to 1")


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What to multiply the peak learning rate by at `step`, counted from 0, of `steps`."""
    warm, falling = schedule.warmup * steps, schedule.decay * steps
    if step + 1 < warm:
        return (step + 1) / warm
    left = steps - step - 1
    if left < falling:
        return schedule.final + (1 - schedule.final) * left / falling
    return 1.0
