"""The memory plan of a serving engine, computed before anything is allocated. It needs no torch.

    budget = process + weights + transient + slots * state + pages * (128 tokens of keys and values)

Each running request has one slot of recurrent state and pages for `context` tokens, so no request is
preempted. `transient` is an upper bound of what a step of `step_tokens` needs in addition to the pools, from
the widths of the layers. `process` is the interpreter, torch and its libraries, and the allocator's slack.
The prefix cache is in host memory: it counts against the budget of a CPU (`cache_bytes`), not of a GPU. With
overcommitted pages requests can be preempted to host memory; `aside_bytes` is the most that they take there,
in addition to the budget.
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
# copies of a row of fp32 logits at a time: itself, scaled or cut, and its cumulative sum in float64 counts
# twice
LOGITS = 4
PROCESS = (
    GIB // 2
)  # measured on a CPU: 0.35 GiB with everything loaded (docs/engine.md); a CUDA context is about as large


@dataclass(frozen=True)
class ServePlan:
    """The engine's allocation:

    `slots` running requests, `pages` of 128 tokens, and the bytes of each part.
    """

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
        """Bytes of the budget that the plan leaves."""
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
    """The plan with the most slots of `context` tokens that fit, at most `max_running`.

    Raises InputError if not one fits.
    """
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
    """A plan with `slots` slots and as many pages as fit, which may be too few for all slots at full length.

    Raises InputError if the pages do not hold one sequence of `context` tokens.
    """
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
    """The plan for exactly `slots` running requests of `context` tokens with `speculate` draft tokens each."""
    pages = slots * -(-context // PAGE)
    per_row = 4 * config.vocab_size * LOGITS + draft_bytes(
        config, speculate
    )  # logits of a running request, and the sampler's copies
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
    """Upper bound in bytes of a step's intermediate tensors in the widest layer, all counted as fp32."""
    widest = max(mixer.transient_numbers(config) for mixer in set(config.mixers))
    return 4 * tokens * (widest + 3 * config.hidden_size)


def draft_bytes(config: "HybridConfig", drafts: int) -> int:
    """Bytes of one request's draft tokens until they are accepted or rejected: their logits and the layers' buffers."""
    if not drafts:
        return 0
    numbers = sum(mixer.draft_numbers(config, drafts) for mixer in config.mixers)
    return 4 * drafts * config.vocab_size + 4 * numbers
