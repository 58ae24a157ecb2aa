"""What surrounds the computation of one step: a retry where memory runs out, and a watchdog."""

import time
from collections.abc import Callable

import torch

from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.sampler import Sampled
from nanohybrid.engine.scheduler import Scheduler, Work

Result = tuple[list[Request], Sampled]


class Watchdog:
    """Measures each step. It is read from another thread, since a step that hangs cannot report anything.

    limit: seconds that a step may take. `slow` counts the steps that took longer; `slowest` is the longest
        time.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.slow, self.slowest = 0, 0.0
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = self.seconds
        self._began = None
        self.slow += seconds > self.limit
        self.slowest = max(self.slowest, seconds)

    @property
    def seconds(self) -> float:
        """How long the step in progress has taken so far; 0 between steps."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def stalled(self) -> bool:
        """Whether the step in progress has exceeded the limit."""
        return self.seconds > self.limit


def run_step(
    work: list[Work], scheduler: Scheduler, runner: Runner, schedule: Callable[[], list[Work]]
) -> tuple[list[Work], Result]:
    """Run the scheduled work; returns the work that was run, and its result.

    Where memory runs out, the token budget is halved and `schedule` plans the step again: any number of times
    before anything is computed, and once more in the middle of a step that only began prompts, so that no
    state was overwritten. Raises what torch raises where that does not help.
    """

    def smaller(error: RuntimeError) -> list[Work]:
        if not out_of_memory(error) or not scheduler.lower_token_budget():
            raise error
        return schedule()

    while (tokens := sum(length for _, _, length in work)) > scheduler.slots.size:
        try:
            runner.probe_memory(tokens)
            break
        except RuntimeError as error:
            work = smaller(error)
    try:
        return work, runner.run(work)
    except RuntimeError as error:
        if any(start for _, start, _ in work):
            raise
        work = smaller(error)
    return work, runner.run(work)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
