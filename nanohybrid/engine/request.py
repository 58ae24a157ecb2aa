"""One request on its way through the engine: what it asked, what it holds, what it has said so far. Plain Python.

`accept` is the whole of postprocessing for one token and runs for every request in every step: what a request does not
use (thinking, stop strings, a stream) is None there and costs one comparison.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanohybrid.engine.block_manager import Lease
from nanohybrid.engine.params import Completion, FinishReason, GenerationError, SamplingParams, Top
from nanohybrid.engine.prompt_lookup import Lookup
from nanohybrid.engine.stops import StopStrings
from nanohybrid.engine.structured_output import Grammar, GrammarState
from nanohybrid.engine.thinking import KEPT, Thinking, opens
from nanohybrid.text import THINK_CLOSE, TextStream, Tokenizer

if TYPE_CHECKING:
    from nanohybrid.engine.scoring import PromptScores

THINK_CLOSE_TOKENS = 16  # `</think>` is spelled by no more tokens than this


class Request:
    """The engine's side of one prompt. `computed` tokens of it have their state in the slot and the pages."""

    __slots__ = (
        "_answer_from", "_forced_count", "_forced_from", "_grammar", "_grammar_state", "_max_tokens", "_stopped_by_id", "_text",
        "_tokenizer", "cache_miss", "cached", "cancelled", "checkpoint_at", "computed", "draft", "error", "family", "finish_reason",
        "forced", "id", "kept", "known", "logprobs", "lookup", "pages",
        "params", "prompt", "salt", "saved", "scores", "seed", "slot", "stop_ids", "stops", "thinking", "tokens", "top_logprobs",
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
        checkpoint_at: Sequence[int] = (),
        salt: str = "",
        scores: "PromptScores | None" = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.id, self.prompt, self.params, self.seed = id, prompt, params, seed
        self.stop_ids = stop_ids.union(params.stop_ids)
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if params.logprobs else None
        self.top_logprobs: Top | None = [] if params.top_logprobs else None
        self.finish_reason: FinishReason | None = None
        self.error: GenerationError | None = None  # why `finish_reason` is "error"
        self.cancelled = False
        self.computed, self.known = 0, len(prompt)
        self.slot: Lease | None = None
        self.pages: Lease | None = None
        self.saved: object | None = (
            None  # what `computed` tokens left behind, where that is not in the slot and the pages
        )
        self.family: list[Request] | None = (
            None  # those who wait for one prompt to be computed; the first computes it
        )
        self.checkpoint_at, self.salt = checkpoint_at, salt
        self.scores = scores  # shared by a family, since one of it computes the prompt
        self.stops: list[int] = []  # where the prompt must pause to leave a checkpoint, the last first
        self.kept: Sequence[Any] = ()  # copies of its first full pages that exist in host memory
        self.cached = 0
        self.cache_miss: str | None = "off"
        self.draft: list[
            int
        ] = []  # what may follow the known tokens: computed in this step, and kept as far as it is said
        self.lookup: Lookup | None = None
        self.forced: deque[int] = deque()  # ids to write instead of sampling
        self._forced_from, self._forced_count = 0, 0
        self._max_tokens = params.max_tokens
        self._stopped_by_id = False
        self._grammar = grammar
        self._grammar_state: GrammarState | None = None  # made when the answer begins
        self._answer_from = 0  # how many tokens were written when it began
        self._tokenizer = tokenizer
        self._text = _Text(tokenizer, params.stop) if stream or params.stop else None
        tail = text_end(tokenizer, prompt)
        self.thinking: Thinking | None = None
        if opens(tail):
            self.thinking = Thinking(tail, params.thinking_budget, params.thinking_grace)
            self._force(self.thinking.begin())

    @property
    def most_tokens(self) -> int:
        """How long the sequence can get: what admission reserves."""
        return len(self.prompt) + self._max_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.cancelled

    def slice(self, start: int, length: int) -> list[int]:
        """The ids of these positions, of the prompt or of what was written since, or drafted behind it."""
        begin = start - len(self.prompt)
        if begin >= 0:
            ids = self.tokens[begin : begin + length]
        else:
            ids = (self.prompt[start : start + length] + self.tokens[: max(begin + length, 0)])[:length]
        return ids if len(ids) == length else ids + self.draft[: length - len(ids)]

    def accept(
        self, token: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None
    ) -> bool:
        """Take the next token (the head of `forced` where there is one); returns whether the request is finished."""
        self.tokens.append(token)
        self.known += 1
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
        elif self._text is not None and self._text.push(token):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_tokens:
            self.finish_reason = "length"
        else:
            return False
        return True

    @property
    def constrained(self) -> bool:
        """Whether a grammar may exclude tokens."""
        return self._grammar is not None

    def allowed_tokens(self, vocab_size: int) -> np.ndarray | None:
        """Which ids the next token may have, bool [vocab_size]; None where any.

        A thinking trace is free, but the text may not end in it, since the answer must follow. The grammar applies to the answer;
        tokens that the thinking budget inserts are not sampled, and so not masked.
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
        """End the request, whether or not its last token ended it."""
        self.finish_reason, self.error = "error", error

    def _begun_answer(self) -> bytes:
        """What the token that ended the trace wrote beyond `</think>`: the beginning of the answer, without leading white space."""
        written = b"".join(map(self._tokenizer.token_bytes, self.tokens[-THINK_CLOSE_TOKENS:]))
        return written.rpartition(THINK_CLOSE.encode())[2].lstrip() if self.tokens else b""

    def take_text(self) -> str:
        """The text that became certain since the last call; only of a request that streams or has stop strings."""
        if self._text is None:
            raise RuntimeError("this request was not added with stream=True")
        return self._text.take(end=self.finished)

    def completion(self) -> Completion:
        """What came of it. The request must be finished."""
        if self.finish_reason is None:
            raise RuntimeError(f"request {self.id} is not finished")
        thinking = self.thinking
        shown = self.tokens[:-1] if self._stopped_by_id else self.tokens
        return Completion(
            text=self._tokenizer.decode(shown) if self._text is None else self._text.whole(),
            token_ids=self.tokens,
            finish_reason=self.finish_reason,
            thinking_tokens=thinking.tokens if thinking else 0,
            thinking_end=thinking.end if thinking else "none",
            logprobs=self.logprobs,
            prompt_tokens=len(self.prompt),
            forced=range(self._forced_from, min(self._forced_from + self._forced_count, len(self.tokens))),
            top_logprobs=self.top_logprobs,
            cached_tokens=self.cached,
            cache_miss=self.cache_miss,
            prompt_logprobs=None if self.scores is None else self.scores.logprobs,
            prompt_top_logprobs=None if self.scores is None else self.scores.top,
            error=self.error,
        )

    def _force(self, text: str | None) -> None:
        if text is not None:
            self.forced.extend(self._tokenizer.encode(text))
            self._forced_from, self._forced_count = len(self.tokens), len(self.forced)


def text_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> bytes:
    """The last bytes of a prompt's text, enough to see whether it leaves a trace open."""
    return b"".join(tokenizer.token_bytes(token) for token in prompt[-KEPT:])


class _Text:
    """The text of a request while it is being written: complete characters only, stop strings held back."""

    __slots__ = ("_characters", "_said", "_stops", "_taken")

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._characters = TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self._said: list[str] = []
        self._taken = 0

    def push(self, token: int) -> bool:
        piece = self._characters.push(token)
        if piece:
            self._add(self._stops.push(piece))
        return self._stops.stopped

    def take(self, end: bool) -> str:
        if end:
            self._finish()
        text = "".join(self._said[self._taken :])
        self._taken = len(self._said)
        return text

    def whole(self) -> str:
        self._finish()
        return "".join(self._said)

    def _finish(self) -> None:
        if not self._stops.stopped:
            self._add(self._stops.push(self._characters.flush()))
            self._add(self._stops.flush())

    def _add(self, text: str) -> None:
        if text:
            self._said.append(text)
