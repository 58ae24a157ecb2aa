"""A conversation: its messages, the next answer, and the answer's text split into thinking and content."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nanohybrid.engine.params import Completion, SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.serve.output_parser import OutputDelta, OutputParser, ReasoningDelta
from nanohybrid.serve.tools import TextDelta
from nanohybrid.text import split_thinking

if TYPE_CHECKING:
    from nanohybrid.engine.engine import Engine
    from nanohybrid.engine.llm import LLM

THINKING_TEMPERATURE, THINKING_TOP_P = 0.6, 0.95  # NVIDIA's model card; answers without thinking are greedy
MIN_ANSWER_TOKENS = 16  # with less left in the context, no answer is begun


class AnswerDelta(NamedTuple):
    """Text of an answer, and whether it belongs to the thinking trace."""

    thinking: bool
    text: str


def _shown(delta: OutputDelta) -> AnswerDelta:
    assert isinstance(delta, ReasoningDelta | TextDelta)  # no tools are offered here
    return AnswerDelta(isinstance(delta, ReasoningDelta), delta.text)


@dataclass
class Conversation:
    """Messages and settings.

    free: the fields "temperature" and "top_p" of `params` that follow the model card, by whether the model
    thinks. thinking: on, off, or None: as the messages and the template say. stop: set it to end the answer
    after the step in progress. asked: how many questions were asked; a seed changes with it.
    """

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

    def ask(self, text: str) -> Iterator[AnswerDelta]:
        """Yield the answer to a message as it is written. An answer that was stopped stays in it.

        Raises InputError where the context is full; the message is then not added.
        """
        self.completion, self.stop = None, False
        prompt = self.llm.encode_chat(
            [*self._system(), *self.turns, {"role": "user", "content": text}], self.thinking
        )
        thinks, may_think = self.llm.opens_thinking(prompt), self.llm.may_think(prompt)
        params = replace(self._params(thinks or may_think, len(prompt)), may_think=may_think)
        request = self.engine.add(prompt, params, stream=True)
        self.asked += 1
        parser, written = OutputParser(thinks, may_think=may_think), ""
        try:
            while not request.finished and not self.stop:
                self.engine.step()
                text_delta = request.take_text()
                written += text_delta
                yield from map(_shown, parser.push(text_delta))
            yield from map(_shown, parser.end())
        finally:
            self.engine.cancel(request)
            answer = split_thinking(written, opened=thinks)[1]
            if answer or request.finish_reason is not None:
                self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        if request.finish_reason is not None:
            from nanohybrid.engine.engine import completed

            self.completion = completed(request)

    def clear(self) -> None:
        """Remove all messages but the system message."""
        self.turns.clear()

    def _system(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _params(self, thinks: bool, length: int) -> SamplingParams:
        context = self.engine.scheduler.max_model_len
        left = context - length
        if left < MIN_ANSWER_TOKENS:
            raise InputError(
                f"the conversation has {length} tokens and the context holds {context}; "
                "/clear starts a new one"
            )
        params = replace(self.params, max_tokens=min(self.params.max_tokens, left))
        if params.seed is not None:
            params = replace(params, seed=params.seed + self.asked)
        if "temperature" in self.free:
            params = replace(params, temperature=THINKING_TEMPERATURE if thinks else 0.0)
        if "top_p" in self.free:
            params = replace(params, top_p=THINKING_TOP_P if thinks else 1.0)
        return params
