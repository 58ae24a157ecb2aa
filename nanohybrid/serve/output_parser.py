"""Splits the text of an answer, while it is written, into reasoning, content and tool calls.

White space around the reasoning and around the content is dropped: it is held back until other text follows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nanohybrid.serve.tools import TextDelta, ToolCallEvent, ToolCallParser
from nanohybrid.serve.xml_tools import XmlToolCallParser
from nanohybrid.text import THINK_CLOSE, THINK_OPEN
from nanohybrid.text.tool_format import NEMOTRON, XML, ToolFormat


class ReasoningDelta(NamedTuple):
    """Text of the thinking trace."""

    text: str


OutputDelta = ReasoningDelta | ToolCallEvent


class OutputParser:
    """Text goes in piece by piece, deltas come out. How the text was cut makes no difference.

    thinking: the text begins inside a trace. may_think: it may begin with `<think>`, which the model writes.
    budgeted: a budget may have ended the trace before the model did; the model's own `</think>` then follows
        in the content and is dropped.
    tools: the JSON schema of each offered tool's arguments, by its name; without any, tags of tool calls are
        content. tool_format: how the model writes calls. max_calls: later calls are dropped.
    """

    def __init__(
        self,
        thinking: bool,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        budgeted: bool = False,
        max_calls: float = float("inf"),
        *,
        may_think: bool = False,
        tool_format: ToolFormat = NEMOTRON,
    ) -> None:
        self._max_calls = max_calls
        self._thinking, self._budgeted = thinking, budgeted
        self._drop_close_tags = thinking and budgeted
        # A `<think>` at the beginning is a tag, also where the prompt has one and the model repeats it.
        self._beginning = "" if thinking or may_think else None
        self._tool_parser = _tool_parser(tools, tool_format) if tools else None
        self._reasoning, self._content = _StrippedStream(), _StrippedStream()
        self._held = ""

    @property
    def calls(self) -> int:
        return int(min(self._tool_parser.calls, self._max_calls)) if self._tool_parser else 0

    def push(self, piece: str) -> list[OutputDelta]:
        """Add text; returns the deltas that it makes certain."""
        if self._beginning is not None:
            begun = self._begin(self._beginning + piece)
            if begun is None:
                return []
            piece = begun
        if not self._thinking and not self._drop_close_tags:
            return self._push_content(piece)
        deltas: list[OutputDelta] = []
        *pieces, last = (
            (self._held + piece).split(THINK_CLOSE)
            if self._drop_close_tags
            else (self._held + piece).split(THINK_CLOSE, 1)
        )
        for before in pieces:
            deltas += self._push_text(before)
            self._thinking = False
        if not self._thinking and not self._drop_close_tags:
            self._held = ""
            return deltas + self._push_text(last)
        keep = len(last) - partial_close_tag(last)
        self._held = last[keep:]
        return deltas + self._push_text(last[:keep])

    def end(self) -> list[OutputDelta]:
        """The text has ended: returns what was held back."""
        held, self._held, self._beginning = (self._beginning or "") + self._held, "", None
        deltas = self._push_text(held)
        if self._tool_parser:
            deltas += self._deltas(self._tool_parser.end())
        return deltas

    def _begin(self, text: str) -> str | None:
        """The text after a `<think>` at its beginning; None while more text may make one."""
        stripped = text.lstrip()
        if len(stripped) < len(THINK_OPEN) and THINK_OPEN.startswith(stripped):
            self._beginning = text
            return None
        self._beginning = None
        if not stripped.startswith(THINK_OPEN):
            return text
        self._thinking, self._drop_close_tags = True, self._budgeted
        return stripped.removeprefix(THINK_OPEN)

    def _push_text(self, text: str) -> list[OutputDelta]:
        if not self._thinking:
            return self._push_content(text)
        shown = self._reasoning.push(text)
        return [ReasoningDelta(shown)] if shown else []

    def _push_content(self, text: str) -> list[OutputDelta]:
        return self._deltas(self._tool_parser.push(text) if self._tool_parser else [TextDelta(text)])

    def _deltas(self, events: list[ToolCallEvent]) -> list[OutputDelta]:
        deltas: list[OutputDelta] = []
        for event in events:
            if not isinstance(event, TextDelta):
                if event.call < self._max_calls:
                    deltas.append(event)
            elif shown := self._content.push(event.text):
                deltas.append(TextDelta(shown))
        return deltas


def _tool_parser(
    tools: Mapping[str, Mapping[str, Any]], format: ToolFormat
) -> ToolCallParser | XmlToolCallParser:
    return XmlToolCallParser(tools) if format == XML else ToolCallParser(frozenset(tools), format)


def partial_close_tag(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `</think>`."""
    return next(
        (n for n in range(min(len(THINK_CLOSE) - 1, len(text)), 0, -1) if text.endswith(THINK_CLOSE[:n])), 0
    )


class _StrippedStream:
    """A stream of text without the white space at its ends."""

    def __init__(self) -> None:
        self._white_space = ""
        self._begun = False

    def push(self, text: str) -> str:
        text = self._white_space + text if self._begun else text.lstrip()
        stripped = text.rstrip()
        self._begun = self._begun or bool(stripped)
        self._white_space = text[len(stripped) :]
        return stripped
