"""Parallel sampling (`n` > 1): a sequence group shares one prompt, which its first request computes for all.

The others wait until there is a state to copy. After that each is a request like any other.
"""

from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.scheduler import Scheduler


def choice_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a prompt; that of the first is `seed` itself.

    The step between two seeds is odd and large, so that prompts with neighboring seeds have no seed in
    common.
    """
    return seed + index * 0xD1B54A32D192ED03


def fork(first: Request, group: list[Request], scheduler: Scheduler, runner: Runner) -> None:
    """The prompt is computed: queue the others of the group with a copy of the first one's state."""
    others = group[1:]
    if others and first.slot and first.pages:
        saved = runner.save(first, first.slot.ids[0], first.pages.ids)
        for request in others:
            request.num_computed_tokens, request.offloaded = first.num_computed_tokens, saved
            request.host_pages = first.host_pages
            request.num_cached_tokens, request.cache_miss = first.num_cached_tokens, first.cache_miss
        scheduler.resume(others)
    for request in group:
        request.group = None


def detach(request: Request, group: list[Request], scheduler: Scheduler) -> None:
    """Remove a cancelled request from its group. The next one takes over the prompt it was computing."""
    computing = group[0] is request
    group.remove(request)
    if computing and group:
        scheduler.hand_over(request, group[0])
    elif computing:
        scheduler.remove(request)
