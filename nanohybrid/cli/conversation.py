"""A conversation: what was said, how the next answer is made, and its text parted into thinking and answer as it comes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nanohybrid.engine.detokenizer import partial_match
from nanohybrid.engine.params import Completion, SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.text import THINK_CLOSE, split_thinking

if TYPE_CHECKING:
    from nanohybrid.engine.engine import Engine
    from nanohybrid.engine.llm import LLM

THINKING_TEMPERATURE, THINKING_TOP_P = 0.6, 0.95  # the model card's; answers without thinking are greedy
ROOM = 16  # tokens: with less left of the context no answer is begun


class Piece(NamedTuple):
    """Some text of an answer, and whether it belongs to the trace."""

    thinking: bool
    text: str


class Parts:
    """Splits a stream of text at `</think>`. The tag and the blank lines around it are not shown."""

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._held = ""
        self._begun = False  # whether any of the answer was shown: line ends before it are dropped

    def push(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        if not self.thinking:
            return self._answer(text)
        before, closed, after = (self._held + text).partition(THINK_CLOSE)
        if closed:
            self.thinking, self._held = False, ""
            return [Piece(True, before), *self._answer(after)] if before else self._answer(after)
        keep = len(before) - partial_match(before, THINK_CLOSE)
        self._held = before[keep:]
        return [Piece(True, before[:keep])] if keep else []

    def flush(self) -> list[Piece]:
        """The end: what looked like the beginning of `</think>` was text."""
        held, self._held = self._held, ""
        return [Piece(True, held)] if held else []

    def _answer(self, text: str) -> list[Piece]:
        text = text if self._begun else text.lstrip("\n")
        self._begun = self._begun or bool(text)
        return [Piece(False, text)] if text else []


@dataclass
class Conversation:
    """Messages and settings; `params` with temperature or top-p None in `free` follow the card by whether it thinks."""

    llm: "LLM"
    engine: "Engine"
    params: SamplingParams
    free: frozenset[str] = frozenset()
    thinking: bool | None = None
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    completion: Completion | None = None
    stop: bool = False
    asked: int = 0

    def ask(self, text: str) -> Iterator[Piece]:
        """Answer, piece by piece. Setting `stop` ends it after the step in progress; what was said of the answer is kept.

        Raises InputError, with nothing remembered, where the conversation has outgrown the context.
        """
        self.completion, self.stop = None, False
        prompt = self.llm.encode_chat(
            [*self._system(), *self.turns, {"role": "user", "content": text}], self.thinking
        )
        thinks = self.llm.opens_thinking(prompt)
        request = self.engine.add(prompt, self._params(thinks, len(prompt)), stream=True)
        self.asked += 1
        parts, said = Parts(thinks), ""
        try:
            while not request.finished and not self.stop:
                self.engine.step()
                taken = request.take_text()
                said += taken
                yield from parts.push(taken)
            yield from parts.flush()
        finally:
            self.engine.cancel(request)
            answer = split_thinking(said, opened=thinks)[1]
            if answer or request.finish_reason is not None:
                self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        if request.finish_reason is not None:
            from nanohybrid.engine.engine import completed

            self.completion = completed(request)

    def clear(self) -> None:
        self.turns.clear()

    def _system(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _params(self, thinks: bool, length: int) -> SamplingParams:
        left = self.engine.scheduler.max_model_len - length
        if left < ROOM:
            raise InputError(
                f"the conversation has {length} tokens and the context holds {self.engine.scheduler.max_model_len}; /clear begins anew"
            )
        params = replace(self.params, max_tokens=min(self.params.max_tokens, left))
        if params.seed is not None:
            params = replace(params, seed=params.seed + self.asked)
        if "temperature" in self.free:
            params = replace(params, temperature=THINKING_TEMPERATURE if thinks else 0.0)
        if "top_p" in self.free:
            params = replace(params, top_p=THINKING_TOP_P if thinks else 1.0)
        return params
