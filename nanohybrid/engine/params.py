"""What a caller asks of a generation and what it gets back: frozen values, without torch."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nanohybrid.errors import InputError, shown
from nanohybrid.model.mixers.checks import FLOAT32_LARGEST, FLOAT32_SMALLEST

FinishReason = Literal["stop", "length", "error"]
Top = list[list[tuple[int, float]]]  # for each token, the most probable ids and their log-probabilities
ThinkingEnd = Literal["natural", "newline", "forced", "none"]


@dataclass(frozen=True)
class StructuredOutputs:
    """What an answer must match: exactly one of these fields.

    The names are those of vLLM's `StructuredOutputsParams`.

    json: a JSON schema, as a mapping or as JSON text (stored as text); the answer is JSON that is valid under
        it.
    json_object: the answer is any JSON object.
    regex: a regular expression that the whole answer matches, in Rust's syntax (no look-around).
    choice: the answer is one of these strings.
    grammar: a context-free grammar in llguidance's Lark syntax, whose rule `start` the whole answer matches.

    Raises InputError where none or several are given, and where `json` is not a JSON object. The engine
    compiles the value (structured_output.py) and raises InputError where it cannot.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", _json_schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
            _demand(
                bool(self.choice) and all(self.choice), "choice", self.choice, "strings that are not empty"
            )
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            names, found = ", ".join(self.__dataclass_fields__), " and ".join(given) or "none of them"
            raise InputError(f"structured outputs need exactly one of {names}; given: {found}")


@dataclass(frozen=True)
class GenerationError:
    """Why a request ended with `finish_reason` "error": a code for programs, and one line for people.

    not_finite: the model's logits had NaN or infinities. grammar_too_complex: the grammar's automaton
        exceeded the limits of llguidance in the middle of the answer.
    """

    code: Literal["not_finite", "grammar_too_complex"]
    message: str


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. The names are vLLM's.

    max_tokens: the most tokens to write, a thinking trace included.
    temperature: 0 is greedy. top_k, top_p, min_p: filters of the distribution; 0, 1 and 0 turn them off.
    seed: makes the text a function of (model, prompt, parameters); None: a new seed for each request.
    stop: strings before which the text ends. stop_ids: further ids that end it. ignore_eos: no id of the
        tokenizer or the configuration ends it.
    thinking_budget: an open `<think>` is closed at the first newline after so many tokens, and
        `thinking_grace` tokens later at the latest; None: no limit. may_think: the answer may begin with
        `<think>`, which then opens a trace (the prompts of most models open it themselves).
    logprobs: return the log-probability of each token, in the distribution before top-k, top-p and min-p:
        log_softmax(logits / temperature), or log_softmax(logits) of a greedy request. The logits are those
        after penalties, bias and grammar. top_logprobs: return so many of the most probable tokens as well.
    presence_penalty, frequency_penalty, repetition_penalty: see penalties.py for the formula.
    logit_bias: a mapping of ids to what is added to their logits (stored as pairs).
    n: completions of the prompt, which is computed once. The first has the seed itself.
    prompt_logprobs: None, or how many alternatives to return beside the log-probability of each token of the
        prompt. Such a prompt is computed whole, not taken from the prefix cache.
    structured_outputs: constrains the answer to a schema, a regular expression or a grammar. It applies to
        the text after a thinking trace. Tokens that it excludes have log-probability -inf.

    Raises InputError, with the field's name, for a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None
    thinking_grace: int = 500
    may_think: bool = False
    logprobs: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    top_logprobs: int = 0
    n: int = 1
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        stop: str | tuple[str, ...] = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple({int(token): value for token, value in bias}.items()))
        _demand(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _demand(
            0 <= self.temperature <= FLOAT32_LARGEST,
            "temperature",
            self.temperature,
            "a number of at least 0 that float32 holds",
        )
        _demand(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _demand(0 <= self.top_k < 2**31, "top_k", self.top_k, "at least 0 (0 turns it off) and below 2^31")
        _demand(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _demand(
            self.thinking_budget is None or self.thinking_budget >= 0,
            "thinking_budget",
            self.thinking_budget,
            "at least 0",
        )
        _demand(self.thinking_grace >= 0, "thinking_grace", self.thinking_grace, "at least 0")
        _demand(all(self.stop), "stop", self.stop, "strings that are not empty")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _demand(abs(value) <= FLOAT32_LARGEST, name, value, "a number that float32 holds")
        repetition = self.repetition_penalty
        _demand(
            FLOAT32_SMALLEST <= repetition <= FLOAT32_LARGEST,
            "repetition_penalty",
            repetition,
            "a number above 0 that float32 holds (1 changes nothing)",
        )
        _demand(
            all(0 <= t < 2**31 and abs(v) <= FLOAT32_LARGEST for t, v in self.bias),
            "logit_bias",
            self.logit_bias,
            "ids of 0 or more with numbers that float32 holds",
        )
        _demand(self.top_logprobs >= 0, "top_logprobs", self.top_logprobs, "at least 0")
        _demand(
            self.logprobs or not self.top_logprobs,
            "top_logprobs",
            self.top_logprobs,
            "0 where logprobs is off",
        )
        _demand(self.n >= 1, "n", self.n, "at least 1")
        _demand(
            (self.prompt_logprobs or 0) >= 0, "prompt_logprobs", self.prompt_logprobs, "None, or at least 0"
        )
        if self.structured_outputs is not None and self.ignore_eos:
            raise InputError(
                "ignore_eos contradicts structured_outputs: an answer that is complete must end; "
                "give one of the two"
            )

    @property
    def penalized(self) -> bool:
        """Whether a penalty is on."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs of an id and what is added to its logit."""
        return self.logit_bias  # type: ignore[return-value]


@dataclass(frozen=True)
class Completion:
    """One finished request.

    text: without special tokens and without the stop string. token_ids: all tokens, a final stop id too.
    thinking_tokens: sampled tokens of the trace, `</think>` included where the model wrote it.
    thinking_end: how the trace ended: by itself ("natural"), at a newline after the budget, "forced" after
        the grace, or "none" where there was no trace or it did not end.
    logprobs, top_logprobs: for each token; of the most probable tokens as (id, log-probability), best first.
    forced: the range of `token_ids` that the thinking budget inserted.
    cached_tokens: tokens of the prompt that were found in the prefix cache. cache_miss: why there are none:
        "off", "no checkpoint", "evicted", or "diverged at token k".
    prompt_logprobs, prompt_top_logprobs: for the tokens of the prompt, from the second on.
    error: why `finish_reason` is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    thinking_tokens: int
    thinking_end: ThinkingEnd
    logprobs: list[float] | None
    prompt_tokens: int
    forced: range = range(0)
    top_logprobs: Top | None = None
    cached_tokens: int = 0
    cache_miss: str | None = None
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: Top | None = None
    error: GenerationError | None = None


def _json_schema(schema: Mapping[str, Any] | str) -> str:
    """The schema as JSON text. Raises InputError where it is not a JSON object."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema))
        if isinstance(json.loads(text), dict):
            return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is not JSON: {' '.join(str(error).split())[:200]}") from None
    raise InputError("the JSON schema is not a JSON object")


def _demand(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name} is {shown(value)}; it must be {wanted}")
