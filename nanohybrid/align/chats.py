"""Chats for SFT: problems of the tasks as conversations, with and without thinking.

The recipe's shares decide how each chat is answered:

    thinking   the reasoning trace, `</think>`, the answer, EOS; all of it has a loss
    direct     thinking is off and the answer follows at once; the empty `<think></think>` of the prompt has
               no loss
    truncated  the trace is cut after some of its lines; then `</think>`, which has no loss, and the answer,
               which has one

Prompts have no loss: predicting the question would take most of the capacity of so small a model.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nanohybrid import tasks
from nanohybrid.align.truncate import truncate_randomly
from nanohybrid.errors import ConfigError
from nanohybrid.tasks import Problem
from nanohybrid.text import ChatTemplate, Tokenizer, TrainingPair

ChatKind = Literal["thinking", "direct", "truncated"]
CHAT_KINDS: tuple[ChatKind, ...] = ("thinking", "direct", "truncated")


@dataclass(frozen=True)
class ChatShares:
    """Shares of the kinds of chats, and of pretraining text."""

    thinking: float = 0.5
    """Chats with a reasoning trace."""
    direct: float = 0.25
    """Chats with thinking off."""
    truncated: float = 0.15
    """Chats with a truncated reasoning trace."""
    text: float = 0.1
    """Share of tokens from pretraining documents, against forgetting."""

    def __post_init__(self) -> None:
        if min(self.thinking, self.direct, self.truncated, self.text) < 0 or self.chats <= 0:
            raise ConfigError(
                "shares must not be negative, and some of thinking, direct and truncated must be positive"
            )

    @property
    def chats(self) -> float:
        """Sum of the shares of chats."""
        return self.thinking + self.direct + self.truncated

    def draw(self, rng: random.Random) -> ChatKind:
        """A random kind of chat."""
        return rng.choices(CHAT_KINDS, (self.thinking, self.direct, self.truncated))[0]


@dataclass(frozen=True)
class TokenizedChat:
    """A chat as ids, and for each id whether it is a target (1) or not (0)."""

    tokens: list[int]
    loss_mask: list[int]


class ChatMaker:
    """Makes chats from problems, with one tokenizer and one chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template

    def prompt(self, problem: Problem, thinking: bool) -> list[int]:
        """Ids of the prompt, up to where the model starts to generate."""
        return self.template.encode(
            self.tokenizer, [{"role": "user", "content": problem.prompt}], thinking=thinking
        )

    def chat(self, problem: Problem, kind: ChatKind, rng: random.Random) -> TokenizedChat:
        """One chat of the given kind. `rng` decides where a truncated trace ends."""
        traces = {
            "thinking": problem.trace,
            "direct": None,
            "truncated": truncate_randomly(problem.trace, rng),
        }
        trace = traces[kind]
        pair = TrainingPair.encode(
            self.tokenizer, self.prompt(problem, thinking=trace is not None), trace, problem.answer
        )
        parts = (
            (pair.prompt, 0),
            (pair.reasoning, 1),
            (pair.think_close, int(kind == "thinking")),
            (pair.answer, 1),
            (pair.end, 1),
        )
        return TokenizedChat(
            [number for ids, _ in parts for number in ids], [loss for ids, loss in parts for _ in ids]
        )


def problems(names: Sequence[str], rng: random.Random) -> Iterator[Problem]:
    """An endless stream of training problems; task and difficulty are drawn uniformly."""
    chosen = [tasks.get(name) for name in names]
    while True:
        task = rng.choice(chosen)
        yield task.make(rng, rng.choice(task.difficulties), "train")


def chats(
    maker: ChatMaker, names: Sequence[str], shares: ChatShares, tokens: int, seed: int
) -> Iterator[TokenizedChat]:
    """Chats over the tasks until they have `tokens` tokens or more. They depend on the seed alone."""
    rng = random.Random(f"chats/{seed}")
    for problem in problems(names, rng):
        if tokens <= 0:
            return
        made = maker.chat(problem, shares.draw(rng), rng)
        tokens -= len(made.tokens)
        yield made
