"""One step's work on the runner, and what is done where there is no memory for it."""

from collections.abc import Callable

import torch

from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.sampler import Sampled
from nanohybrid.engine.scheduler import Scheduler, Work

Result = tuple[list[Request], Sampled]


def compute(
    work: list[Work], scheduler: Scheduler, runner: Runner, schedule: Callable[[], list[Work]]
) -> tuple[list[Work], Result]:
    """Run the work; returns what was run, and what came of it.

    Where there is no memory, prompts get a smaller budget, and `schedule` plans the step anew: for as long as nothing was
    computed, and once more where memory gave out on the way and the step only began prompts, so that no state was overwritten.
    """

    def smaller(error: RuntimeError) -> list[Work]:
        if not out_of_memory(error) or not scheduler.shrink():
            raise error
        return schedule()

    while (tokens := sum(length for _, _, length in work)) > scheduler.slots.size:
        try:
            runner.reserve(tokens)
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
    """Whether torch could not have memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
