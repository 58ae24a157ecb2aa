"""Several completions of one prompt: a family of requests, of which the first computes the prompt for all.

The others wait until there is something to copy, and then are requests as any other.
"""

from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.scheduler import Scheduler


def choice_seed(seed: int, index: int) -> int:
    """The seed of the choice `index` of a prompt; of the first, the seed itself. The step is odd and large, so that the
    choices of neighboring seeds are not each other's."""
    return seed + index * 0xD1B54A32D192ED03


def fork(first: Request, family: list[Request], scheduler: Scheduler, runner: Runner) -> None:
    """The prompt is computed: the others of the family wait for a slot with a copy of what it left behind."""
    others = family[1:]
    if others and first.slot and first.pages:
        saved = runner.save(first, first.slot.ids[0], first.pages.ids)
        for request in others:
            request.computed, request.saved, request.kept = first.computed, saved, first.kept
            request.cached, request.cache_miss = first.cached, first.cache_miss
        scheduler.resume(others)
    for request in family:
        request.family = None


def leave(request: Request, family: list[Request], scheduler: Scheduler) -> None:
    """Take a cancelled request out of its family; where it was computing the prompt, the next one goes on with that."""
    computing = family[0] is request
    family.remove(request)
    if computing and family:
        scheduler.replace(request, family[0])
    elif computing:
        scheduler.remove(request)
