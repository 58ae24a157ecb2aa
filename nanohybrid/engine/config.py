"""How an engine is set up: one frozen value, with vLLM's names where vLLM has the same thing.

Plain Python, no torch.
"""

import warnings
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Self

from nanohybrid.engine.prompt_lookup import MOST_DRAFT_TOKENS
from nanohybrid.errors import InputError
from nanohybrid.ops.sizes import CHUNK

MAX_MODEL_LEN = 4096
"""Tokens of a sequence where neither the configuration nor the prompts say."""

RENAMED = {
    "max_running": "max_num_seqs",
    "max_context": "max_model_len",
    "token_budget": "max_num_batched_tokens",
    "pages": "num_kv_pages",
    "cache_bytes": "prefix_cache_bytes",
    "checkpoint_every": "prefix_cache_interval",
    "speculate": "num_speculative_tokens",
    "state_dtype": "mamba_ssm_cache_dtype",
    "kv_dtype": "kv_cache_dtype",
    "step_seconds": "step_timeout",
}
"""Names of the previous release, which are accepted for one more with a DeprecationWarning."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine holds and how it schedules.

    Raises InputError, with the field's name, for a value that cannot be used.

    max_num_seqs: sequences that run at once; each has one slot of recurrent state.
    max_model_len: tokens of the longest sequence, prompt and answer. None: 4,096 or the model's longest,
        whichever is less; `LLM` takes what its prompts need.
    max_num_batched_tokens: tokens that one step computes at most. It bounds the transient memory of a step,
        and how long a prompt delays the sequences that decode. Never less than `max_num_seqs` + 128.
    num_kv_pages: KV pages of 128 tokens. None: enough for `max_num_seqs` sequences of `max_model_len` tokens.
    overcommit: admit a request by what its prompt needs, instead of by the most that it can ever need. Where
        pages run out, the youngest request is preempted: its state and pages are swapped out to host memory,
        and it goes on later with the same bits.
    prefix_cache_bytes: host memory for the prefix cache; 0 turns it off.
    prefix_cache_interval: tokens between two states that the prefix cache saves of a long prompt; a multiple
        of 128.
    deterministic: compute each request by itself, so that no other request changes a bit of its answer.
        Slower.
    num_speculative_tokens: tokens drafted by prompt lookup for each sequence and step, 0 to 15; 0 turns it
        off.
    mamba_ssm_cache_dtype: precision of the SSM states, "fp32" or "fp16" (rounded stochastically).
    kv_cache_dtype: precision of keys and values, "auto" (that of the model) or "fp8".
    step_timeout: seconds after which the step in progress counts as stalled (`Engine.watchdog`).
    debug: check every use of slots and pages (sanitizer.py). None: as the environment variable
        NANOHYBRID_DEBUG says.
    """

    max_num_seqs: int = 64
    max_model_len: int | None = None
    max_num_batched_tokens: int = 2048
    num_kv_pages: int | None = None
    overcommit: bool = False
    prefix_cache_bytes: int = 0
    prefix_cache_interval: int = 1024
    deterministic: bool = False
    num_speculative_tokens: int = 0
    mamba_ssm_cache_dtype: str = "fp32"
    kv_cache_dtype: str = "auto"
    step_timeout: float = float("inf")
    debug: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "num_kv_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if self.prefix_cache_bytes < 0:
            raise InputError(f"prefix_cache_bytes is {self.prefix_cache_bytes}; it must be at least 0")
        if self.prefix_cache_interval < CHUNK or self.prefix_cache_interval % CHUNK:
            raise InputError(
                f"prefix_cache_interval is {self.prefix_cache_interval}; "
                f"it must be a multiple of {CHUNK} tokens"
            )
        if not 0 <= self.num_speculative_tokens <= MOST_DRAFT_TOKENS:
            raise InputError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; "
                f"it must be from 0 to {MOST_DRAFT_TOKENS}"
            )
        if self.num_speculative_tokens and self.deterministic:
            raise InputError(
                "num_speculative_tokens contradicts deterministic: "
                "several tokens that are computed at once round differently"
            )

    @classmethod
    def of(cls, config: Self | None, options: dict[str, Any], stacklevel: int = 3) -> Self:
        """`config` (None: the defaults) with the fields replaced that `options` names.

        A name of the previous release gives a DeprecationWarning, at the caller `stacklevel` frames up.
        Raises InputError for a name that is no field.
        """
        if config is not None and not isinstance(config, cls):
            raise InputError(
                f"{config!r} is no EngineConfig; options are given by name, for instance max_num_seqs=8"
            )
        known = {field.name for field in fields(cls)}
        current: dict[str, Any] = {}
        for name, value in options.items():
            if name in RENAMED:
                text = f"{name} is deprecated; use {RENAMED[name]}"
                warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
                name = RENAMED[name]
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                raise InputError(f"the engine has no option {name!r}; {hint}")
            if name in current:
                raise InputError(
                    f"the engine's option {name} is given twice, by its old name and its new one"
                )
            current[name] = value
        return replace(cls() if config is None else config, **current)

    def longest(self, model_longest: int) -> int:
        """`max_model_len`, where a model was made for sequences of at most `model_longest` tokens."""
        return min(MAX_MODEL_LEN, model_longest) if self.max_model_len is None else self.max_model_len
