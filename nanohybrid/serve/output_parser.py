"""The text of an answer, parted as it comes: what was thought, what is said, which tools are called.

Blank space around the thought and around the answer is shown to nobody: it is held back until something follows it.
"""

from typing import NamedTuple

from nanohybrid.serve.tools import Event, Text, ToolReader
from nanohybrid.text import THINK_CLOSE


class Thought(NamedTuple):
    """Some text of the trace."""

    text: str


Part = Thought | Event


class Answer:
    """Text goes in by pieces, parts come out; how it was cut makes no difference.

    `thinking`: it begins inside a trace. `budgeted`: a budget may have ended the trace before the model did, and the
    model's own `</think>` then follows in the answer: it is dropped. `tools`: the names on offer; without any, a tool tag is text.
    `most_calls`: later ones are dropped.
    """

    def __init__(
        self,
        thinking: bool,
        tools: frozenset[str] = frozenset(),
        budgeted: bool = False,
        most_calls: float = float("inf"),
    ) -> None:
        self._most_calls = most_calls
        self._thinking, self._drop = thinking, thinking and budgeted
        self._reader = ToolReader(tools) if tools else None
        self._thought, self._said = _Trimmed(), _Trimmed()
        self._held = ""

    @property
    def calls(self) -> int:
        return int(min(self._reader.calls, self._most_calls)) if self._reader else 0

    def push(self, piece: str) -> list[Part]:
        """The parts that this piece makes certain."""
        if not self._thinking and not self._drop:
            return self._say(piece)
        parts: list[Part] = []
        *pieces, last = (
            (self._held + piece).split(THINK_CLOSE)
            if self._drop
            else (self._held + piece).split(THINK_CLOSE, 1)
        )
        for before in pieces:
            parts += self._put(before)
            self._thinking = False
        if not self._thinking and not self._drop:
            self._held = ""
            return parts + self._put(last)
        keep = len(last) - begun(last)
        self._held = last[keep:]
        return parts + self._put(last[:keep])

    def end(self) -> list[Part]:
        """What was held back and is text after all."""
        held, self._held = self._held, ""
        parts = self._put(held)
        if self._reader:
            parts += self._parts(self._reader.end())
        return parts

    def _put(self, text: str) -> list[Part]:
        if not self._thinking:
            return self._say(text)
        shown = self._thought.push(text)
        return [Thought(shown)] if shown else []

    def _say(self, text: str) -> list[Part]:
        return self._parts(self._reader.push(text) if self._reader else [Text(text)])

    def _parts(self, events: list[Event]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            if not isinstance(event, Text):
                if event.call < self._most_calls:
                    parts.append(event)
            elif shown := self._said.push(event.text):
                parts.append(Text(shown))
        return parts


def begun(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a closing tag."""
    return next(
        (n for n in range(min(len(THINK_CLOSE) - 1, len(text)), 0, -1) if text.endswith(THINK_CLOSE[:n])), 0
    )


class _Trimmed:
    """A stream of text without the blank space at its ends."""

    def __init__(self) -> None:
        self._blank = ""
        self._begun = False

    def push(self, text: str) -> str:
        text = self._blank + text if self._begun else text.lstrip()
        kept = text.rstrip()
        self._begun = self._begun or bool(kept)
        self._blank = text[len(kept) :]
        return kept
