"""How much of a memory goes to what, before anything is served. Plain Python over plain numbers, no torch.

    budget = process + weights + transient + slots * state + pages * (128 tokens of keys and values)

One slot of recurrent state for each running request; pages for `context` tokens of each, so that nobody who runs is ever put
aside. `transient` is what a step of `step_tokens` needs beside the pools, from the widths of the layers: an upper bound, not a
measurement. `process` is the interpreter, torch and its libraries, and the allocator's slack. The prefix cache lies in host
memory and is not part of the budget of a GPU; on a CPU it is, by `cache_bytes`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanohybrid.errors import InputError
from nanohybrid.ops.sizes import CHUNK, PAGE

if TYPE_CHECKING:
    from nanohybrid.config import HybridConfig
    from nanohybrid.model import Footprint

GIB = 2**30
STEP_TOKENS = 2048
LOGITS = 4  # copies of a row of fp32 logits at a time: itself, scaled or cut, and its cumulative sum in float64 counts twice
PROCESS = GIB // 2  # measured on a CPU: 0.35 GiB with everything loaded (docs/engine.md); a CUDA context is about as large


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

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.state_bytes + self.kv_bytes + self.transient_bytes + self.cache_bytes + self.process_bytes

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
) -> ServePlan:
    """The most slots of `context` tokens each that fit, at most `max_running`. Raises InputError where not even one does."""
    if context < 1 or (max_running is not None and max_running < 1):
        raise InputError(f"--context is {context} and --max-running {max_running}; both must be at least 1")
    pages_each = -(-context // PAGE)
    each = footprint.state_bytes_per_sequence + pages_each * PAGE * footprint.kv_bytes_per_token
    per_row = 4 * config.vocab_size * LOGITS  # a running request's row of logits, and what sampling makes of it
    fixed = PROCESS + footprint.weight_bytes + transient(config, footprint, step_tokens) + cache_bytes
    slots = (budget_bytes - fixed) // (each + per_row)
    if max_running is not None:
        slots = min(slots, max_running)
    if slots < 1:
        raise InputError(
            f"one sequence of {context} tokens takes {size(fixed + each + per_row)} with weights ({size(footprint.weight_bytes)}) "
            f"and process, the budget is {size(budget_bytes)}; raise --memory-gib or shorten --context"
        )
    return ServePlan(
        budget_bytes=budget_bytes,
        context=context,
        slots=slots,
        pages=slots * pages_each,
        step_tokens=step_tokens,
        weight_bytes=footprint.weight_bytes,
        state_bytes=slots * footprint.state_bytes_per_sequence,
        kv_bytes=slots * pages_each * PAGE * footprint.kv_bytes_per_token,
        transient_bytes=transient(config, footprint, step_tokens) + slots * per_row,
        cache_bytes=cache_bytes,
    )


def transient(config: "HybridConfig", footprint: "Footprint", tokens: int) -> int:
    """Bytes that the widest layer makes of a step of `tokens`, at most, beside the residual stream; all counted as fp32."""
    widest = 0
    if "M" in config.pattern:
        inner, grouped = config.mamba_inner_size, config.n_groups * config.ssm_state_size
        projected = 2 * inner + 2 * grouped + config.mamba_num_heads
        chunk = config.mamba_num_heads * CHUNK * 4 + 3 * config.mamba_num_heads * config.mamba_head_dim
        widest = max(widest, 4 * projected + chunk)  # projected, convolved, regrouped; decays and scores of a round of chunks
    if "-" in config.pattern:
        widest = max(widest, 2 * config.intermediate_size)
    if "*" in config.pattern:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        widest = max(widest, 3 * heads * config.head_dim)
    return 4 * tokens * (widest + 3 * config.hidden_size)


def size(count: int) -> str:
    """Bytes as people read them, in binary units."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} bytes"
