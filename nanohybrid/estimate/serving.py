"""How much of a memory goes to what, before anything is served. Plain Python over plain numbers, no torch.

    budget = process + weights + transient + slots * state + pages * (128 tokens of keys and values)

One slot of recurrent state for each running request; pages for `context` tokens of each, so that nobody who runs is ever put
aside. `transient` is what a step of `step_tokens` needs beside the pools, from the widths of the layers: an upper bound, not a
measurement. `process` is the interpreter, torch and its libraries, and the allocator's slack. The prefix cache lies in host
memory and is not part of the budget of a GPU; on a CPU it is, by `cache_bytes`. Where pages are overcommitted, so does what is
put aside: `aside_bytes` is the most that can be, beside the budget.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nanohybrid.errors import InputError
from nanohybrid.estimate.units import GIB, size
from nanohybrid.ops.sizes import PAGE

if TYPE_CHECKING:
    from nanohybrid.config import HybridConfig
    from nanohybrid.estimate import Footprint

STEP_TOKENS = 2048
LOGITS = 4  # copies of a row of fp32 logits at a time: itself, scaled or cut, and its cumulative sum in float64 counts twice
PROCESS = (
    GIB // 2
)  # measured on a CPU: 0.35 GiB with everything loaded (docs/engine.md); a CUDA context is about as large


@dataclass(frozen=True)
class ServePlan:
    """What the engine allots: `slots` running requests, `pages` of 128 tokens, and the bytes of each part."""

    budget_bytes: int
    context: int
    slots: int
    pages: int
    step_tokens: int
    weight_bytes: int
    state_bytes: int
    kv_bytes: int
    transient_bytes: int
    cache_bytes: int
    process_bytes: int = PROCESS
    aside_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return (
            self.weight_bytes
            + self.state_bytes
            + self.kv_bytes
            + self.transient_bytes
            + self.cache_bytes
            + self.process_bytes
        )

    @property
    def free_bytes(self) -> int:
        """What the budget has left."""
        return self.budget_bytes - self.total_bytes


def plan_serve(
    config: "HybridConfig",
    footprint: "Footprint",
    budget_bytes: int,
    context: int,
    max_running: int | None = None,
    step_tokens: int = STEP_TOKENS,
    cache_bytes: int = 0,
    speculate: int = 0,
) -> ServePlan:
    """The most slots of `context` tokens each that fit, at most `max_running`. Raises InputError where not even one does."""
    if context < 1 or (max_running is not None and max_running < 1):
        raise InputError(
            f"--max-model-len is {context} and --max-num-seqs {max_running}; both must be at least 1"
        )
    one = plan_slots(config, footprint, 1, context, step_tokens, cache_bytes, speculate)
    more = (
        plan_slots(config, footprint, 2, context, step_tokens, cache_bytes, speculate).total_bytes
        - one.total_bytes
    )
    slots = 1 + (budget_bytes - one.total_bytes) // more
    if max_running is not None:
        slots = min(slots, max_running)
    if slots < 1:
        raise _too_small(one, budget_bytes)
    return replace(
        plan_slots(config, footprint, slots, context, step_tokens, cache_bytes, speculate),
        budget_bytes=budget_bytes,
    )


def plan_overcommitted(
    config: "HybridConfig",
    footprint: "Footprint",
    budget_bytes: int,
    context: int,
    slots: int,
    step_tokens: int = STEP_TOKENS,
    cache_bytes: int = 0,
    speculate: int = 0,
) -> ServePlan:
    """So many slots, and the pages that the budget has left, enough for one sequence of `context` tokens at least."""
    full = plan_slots(config, footprint, slots, context, step_tokens, cache_bytes, speculate)
    page_bytes, least = PAGE * footprint.kv_bytes_per_token, full.pages // slots
    missing = max(full.total_bytes - budget_bytes, 0)
    pages = full.pages - (-(-missing // page_bytes) if page_bytes else 0)
    if pages < least or (missing and not page_bytes):
        raise _too_small(
            replace(full, slots=slots, kv_bytes=least * page_bytes), budget_bytes, "or lower --max-num-seqs"
        )
    aside = (slots - 1) * footprint.state_bytes_per_sequence + (full.pages - least) * page_bytes
    return replace(
        full, budget_bytes=budget_bytes, pages=pages, kv_bytes=pages * page_bytes, aside_bytes=aside
    )


def plan_slots(
    config: "HybridConfig",
    footprint: "Footprint",
    slots: int,
    context: int,
    step_tokens: int = STEP_TOKENS,
    cache_bytes: int = 0,
    speculate: int = 0,
) -> ServePlan:
    """What `slots` running requests of `context` tokens each take, of which each may draft; the budget is just that."""
    pages = slots * -(-context // PAGE)
    per_row = 4 * config.vocab_size * LOGITS + draft_bytes(
        config, speculate
    )  # a running request's logits, and what sampling makes of it
    plan = ServePlan(
        budget_bytes=0,
        context=context,
        slots=slots,
        pages=pages,
        step_tokens=step_tokens,
        weight_bytes=footprint.weight_bytes,
        state_bytes=slots * footprint.state_bytes_per_sequence,
        kv_bytes=pages * PAGE * footprint.kv_bytes_per_token,
        transient_bytes=transient(config, step_tokens) + slots * per_row,
        cache_bytes=cache_bytes,
    )
    return replace(plan, budget_bytes=plan.total_bytes)


def _too_small(plan: ServePlan, budget_bytes: int, other: str = "or shorten the context") -> InputError:
    what = "one sequence" if plan.slots == 1 else f"states of {plan.slots} sequences and the pages of one"
    return InputError(
        f"{what} of {plan.context} tokens takes {size(plan.total_bytes)} with weights ({size(plan.weight_bytes)}), process "
        f"({size(plan.process_bytes)}) and cache ({size(plan.cache_bytes)}); the budget is {size(budget_bytes)}: raise --memory-gib {other}"
    )


def transient(config: "HybridConfig", tokens: int) -> int:
    """Bytes that the widest layer makes of a step of `tokens`, at most, beside the residual stream; all counted as fp32."""
    widest = max(mixer.transient_numbers(config) for mixer in set(config.mixers))
    return 4 * tokens * (widest + 3 * config.hidden_size)


def draft_bytes(config: "HybridConfig", drafts: int) -> int:
    """Bytes that one request's draft tokens take until they are accepted or rejected: logits of each, and what layers buffer."""
    if not drafts:
        return 0
    numbers = sum(mixer.draft_numbers(config, drafts) for mixer in config.mixers)
    return 4 * drafts * config.vocab_size + 4 * numbers
