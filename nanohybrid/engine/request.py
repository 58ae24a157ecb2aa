"""One request on its way through the engine: what it asks, what it holds, what it has written. Plain Python.

`accept` is all postprocessing of one token and runs for every request in every step. What a request does not
use (thinking, stop strings, a stream) is None there and costs one comparison.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanohybrid.engine.block_manager import Allocation
from nanohybrid.engine.detokenizer import Detokenizer
from nanohybrid.engine.params import Completion, FinishReason, GenerationError, SamplingParams, Top
from nanohybrid.engine.structured_output import Grammar, GrammarState
from nanohybrid.engine.thinking import Thinking, closes, opens, prompt_tail
from nanohybrid.text import THINK_CLOSE, Tokenizer

if TYPE_CHECKING:
    from nanohybrid.engine.scoring import PromptScores

THINK_CLOSE_TOKENS = 16  # `</think>` is spelled by no more tokens than this


class Request:
    """The engine's side of one completion.

    The state of its first `num_computed_tokens` tokens is in its slot and pages, or in `offloaded` while it
    waits. `num_tokens` counts the prompt and what was written.
    """

    __slots__ = (
        "__weakref__", "_answer_from", "_detokenizer", "_forced_count", "_forced_from", "_grammar",
        "_grammar_state", "_max_tokens", "_stopped_by_id", "_tokenizer", "breakpoints", "cache_breakpoints",
        "cache_miss", "cancelled", "draft", "error", "finish_reason", "forced", "group", "host_pages", "id",
        "logprobs", "num_cached_tokens", "num_computed_tokens", "num_tokens", "offloaded", "pages", "params",
        "prompt", "salt", "scores", "seed", "slot", "stop_ids", "thinking", "tokens", "top_logprobs",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        seed: int,
        stop_ids: frozenset[int] = frozenset(),
        stream: bool = False,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
        scores: "PromptScores | None" = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.id, self.prompt, self.params, self.seed = id, prompt, params, seed
        self.stop_ids = stop_ids.union(params.stop_ids)
        self.tokens: list[int] = []  # what was written
        self.logprobs: list[float] | None = [] if params.logprobs else None
        self.top_logprobs: Top | None = [] if params.top_logprobs else None
        self.finish_reason: FinishReason | None = None
        self.error: GenerationError | None = None  # why `finish_reason` is "error"
        self.cancelled = False
        self.num_computed_tokens, self.num_tokens = 0, len(prompt)
        self.slot: Allocation | None = None
        self.pages: Allocation | None = None
        self.offloaded: object | None = None  # a copy of its state in host memory
        # The sequence group of a prompt with n > 1 until the prompt is computed; the first one computes it.
        self.group: list[Request] | None = None
        self.scores = scores  # shared by a group
        # After which tokens of the prompt the caller and the prefix cache want a snapshot saved.
        self.cache_breakpoints, self.salt = cache_breakpoints, salt
        self.breakpoints: list[int] = []  # those that are ahead, the last first
        self.host_pages: Sequence[Any] = ()  # copies of its first full pages that are in host memory
        self.num_cached_tokens = 0
        self.cache_miss: str | None = "off"
        self.draft: list[int] = []  # tokens computed speculatively in this step, after the known ones
        self.forced: deque[int] = deque()  # ids that are written instead of sampled ones
        self._forced_from, self._forced_count = 0, 0
        self._max_tokens = params.max_tokens
        self._stopped_by_id = False
        self._grammar = grammar
        self._grammar_state: GrammarState | None = None  # made when the answer begins
        self._answer_from = 0  # how many tokens were written when it began
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.stop) if stream or params.stop else None
        tail = prompt_tail(tokenizer, prompt)
        self.thinking: Thinking | None = None
        if opens(tail):
            self.thinking = Thinking(tail, params.thinking_budget, params.thinking_grace)
            self._force(self.thinking.begin())
        elif params.may_think and not closes(tail):
            self.thinking = Thinking(tail, params.thinking_budget, params.thinking_grace, opened=False)
            # A grammar begins after the trace, so it must be known whether there is one.
            opened = self.thinking.open() if grammar is not None and params.thinking_budget != 0 else None
            self._force(opened or self.thinking.begin())

    @property
    def max_total_tokens(self) -> int:
        """The most tokens that the sequence can have, prompt and answer."""
        return len(self.prompt) + self._max_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.cancelled

    @property
    def constrained(self) -> bool:
        """Whether a grammar may exclude tokens."""
        return self._grammar is not None

    def slice(self, start: int, length: int) -> list[int]:
        """The ids at `length` positions from `start` on, of the prompt, the answer and the draft."""
        begin = start - len(self.prompt)
        if begin >= 0:
            ids = self.tokens[begin : begin + length]
        else:
            ids = (self.prompt[start : start + length] + self.tokens[: max(begin + length, 0)])[:length]
        return ids if len(ids) == length else ids + self.draft[: length - len(ids)]

    def accept(
        self, token: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None
    ) -> bool:
        """Write the next token, which is the first of `forced` where there is one.

        Returns whether the request is finished.
        """
        self.tokens.append(token)
        self.num_tokens += 1
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
            if self.top_logprobs is not None and top is not None:
                self.top_logprobs.append(top[: self.params.top_logprobs])
        if self.forced:
            self.forced.popleft()
        elif self.thinking is not None and self.thinking.active and token not in self.stop_ids:
            self._force(self.thinking.push(self._tokenizer.token_bytes(token)))
        if token in self.stop_ids:
            self.finish_reason, self._stopped_by_id = "stop", True
        elif self._detokenizer is not None and self._detokenizer.push(token):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_tokens:
            self.finish_reason = "length"
        else:
            return False
        return True

    def allowed_tokens(self, vocab_size: int) -> np.ndarray | None:
        """Which ids the grammar allows as the next token, bool [vocab_size]; None where it allows all.

        In a thinking trace every token is allowed but those that end the text, since the answer must follow.
        Tokens that the thinking budget inserts are not sampled, and so not masked.
        """
        if self._grammar is None or self.forced:
            return None
        if self.thinking is not None and self.thinking.active:
            allowed_V = np.ones(vocab_size, dtype=bool)
            allowed_V[[token for token in self.stop_ids if token < vocab_size]] = False
            return allowed_V
        if self._grammar_state is None:
            self._answer_from = len(self.tokens)
            self._grammar_state = GrammarState(self._grammar, self._begun_answer())
        allowed_V = self._grammar_state.allowed(self.tokens[self._answer_from :])
        if self._grammar_state.error is not None:
            self.error = GenerationError(
                "grammar_too_complex", f"the grammar exceeds its limits: {self._grammar_state.error}"
            )
        return allowed_V

    def fail(self, error: GenerationError) -> None:
        """End the request with an error."""
        self.finish_reason, self.error = "error", error

    def take_text(self) -> str:
        """The text that became certain since the last call.

        Raises RuntimeError where it was not detokenized.
        """
        if self._detokenizer is None:
            raise RuntimeError("this request was not added with stream=True")
        return self._detokenizer.take(end=self.finished)

    def completion(self) -> Completion:
        """The result of a finished request. Raises RuntimeError where it is not finished."""
        if self.finish_reason is None:
            raise RuntimeError(f"request {self.id} is not finished")
        thinking = self.thinking
        shown = self.tokens[:-1] if self._stopped_by_id else self.tokens
        return Completion(
            text=self._tokenizer.decode(shown) if self._detokenizer is None else self._detokenizer.whole(),
            token_ids=self.tokens,
            finish_reason=self.finish_reason,
            thinking_tokens=thinking.tokens if thinking else 0,
            thinking_end=thinking.end if thinking else "none",
            logprobs=self.logprobs,
            prompt_tokens=len(self.prompt),
            forced=range(self._forced_from, min(self._forced_from + self._forced_count, len(self.tokens))),
            top_logprobs=self.top_logprobs,
            cached_tokens=self.num_cached_tokens,
            cache_miss=self.cache_miss,
            prompt_logprobs=None if self.scores is None else self.scores.logprobs,
            prompt_top_logprobs=None if self.scores is None else self.scores.top,
            error=self.error,
        )

    def _begun_answer(self) -> bytes:
        """The beginning of the answer that the last token of the trace wrote after `</think>`.

        Without leading white space; often empty.
        """
        written = b"".join(map(self._tokenizer.token_bytes, self.tokens[-THINK_CLOSE_TOKENS:]))
        return written.rpartition(THINK_CLOSE.encode())[2].lstrip() if self.tokens else b""

    def _force(self, text: str | None) -> None:
        if text is not None:
            self.forced.extend(self._tokenizer.encode(text))
            self._forced_from, self._forced_count = len(self.tokens), len(self.forced)
