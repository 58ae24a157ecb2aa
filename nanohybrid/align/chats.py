"""Chats to learn from: problems of the tasks, as conversations with and without thinking.

Three ways to answer, drawn for each chat by the recipe's shares:
- thinking: the worked trace, `</think>`, the answer, the end of the turn; all of it is learned;
- direct: thinking is off, the answer follows at once; what stands in the prompt, its empty `<think></think>` too, is not learned;
- truncated: the trace is cut after some of its lines, then `</think>`, which is *not* learned, and the answer, which is.

A prompt carries no loss: to predict the question costs so small a model most of what it has.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nanohybrid import tasks
from nanohybrid.align.truncate import truncated
from nanohybrid.errors import ConfigError
from nanohybrid.tasks import Problem
from nanohybrid.text import ChatTemplate, Tokenizer, TrainingPair

Way = Literal["thinking", "direct", "truncated"]
WAYS: tuple[Way, ...] = ("thinking", "direct", "truncated")


@dataclass(frozen=True)
class Shares:
    """Shares of the ways to answer; of text, the share of tokens."""

    thinking: float = 0.5
    direct: float = 0.25
    truncated: float = 0.15
    text: float = 0.1
    """Documents of the pretraining data, so that the model does not forget how to read."""

    def __post_init__(self) -> None:
        if min(self.thinking, self.direct, self.truncated, self.text) < 0 or self.chats <= 0:
            raise ConfigError(
                "shares must not be negative, and some of thinking, direct and truncated must be positive"
            )

    @property
    def chats(self) -> float:
        """What is left beside text."""
        return self.thinking + self.direct + self.truncated

    def draw(self, rng: random.Random) -> Way:
        """One of the three ways."""
        return rng.choices(WAYS, (self.thinking, self.direct, self.truncated))[0]


@dataclass(frozen=True)
class Tokens:
    """A document as ids, and for each whether it is a target."""

    tokens: list[int]
    loss: list[int]


class ChatMaker:
    """Makes chats from problems with one tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template

    def prompt(self, problem: Problem, thinking: bool) -> list[int]:
        """Ids up to where the model begins to write."""
        return self.template.encode(
            self.tokenizer, [{"role": "user", "content": problem.prompt}], thinking=thinking
        )

    def chat(self, problem: Problem, way: Way, rng: random.Random) -> Tokens:
        """One chat, answered in the given way."""
        trace = {"thinking": problem.trace, "direct": None, "truncated": truncated(problem.trace, rng)}[way]
        pair = TrainingPair.encode(
            self.tokenizer, self.prompt(problem, thinking=trace is not None), trace, problem.answer
        )
        learned = (
            (pair.prompt, 0),
            (pair.reasoning, 1),
            (pair.think_close, int(way == "thinking")),
            (pair.answer, 1),
            (pair.end, 1),
        )
        return Tokens(
            [number for ids, _ in learned for number in ids], [loss for ids, loss in learned for _ in ids]
        )


def problems(names: Sequence[str], rng: random.Random) -> Iterator[Problem]:
    """Training problems without end: a task and a difficulty drawn evenly."""
    chosen = [tasks.get(name) for name in names]
    while True:
        task = rng.choice(chosen)
        yield task.make(rng, rng.choice(task.difficulties), "train")


def chats(maker: ChatMaker, names: Sequence[str], shares: Shares, tokens: int, seed: int) -> Iterator[Tokens]:
    """Chats over the tasks until they hold so many tokens; a function of the seed."""
    rng = random.Random(f"chats/{seed}")
    for problem in problems(names, rng):
        if tokens <= 0:
            return
        made = maker.chat(problem, shares.draw(rng), rng)
        tokens -= len(made.tokens)
        yield made
