"""Parses tool calls that are JSON objects in a stream of text: the formats nemotron, hermes and json.

    <TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>

The parser reads one character at a time and never looks back, so the result does not depend on how the text
was cut. A call is emitted as soon as its name and the first brace of its arguments were read, and its
arguments as they are written.

What has only one meaning is repaired: missing brackets and closing tags, arguments as JSON text in a string,
members in another order, `parameters` instead of `arguments`, arguments that are null or missing, and raw
newlines and tabs inside strings, which become escapes. What is not a call (no JSON, or a tool that was
not offered) is content, as the model wrote it. Arguments that turn out to be broken after they were emitted
stay as they were written, as in OpenAI's API.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from nanohybrid.strict_json import SURROGATE, refuse_constant
from nanohybrid.text.tool_format import NEMOTRON, ToolFormat

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
SEPARATORS = " \t\r\n,;"


class TextDelta(NamedTuple):
    """Content: text that is no tool call."""

    text: str


class ToolCallStart(NamedTuple):
    """A tool call begins. call: its index in the answer."""

    call: int
    name: str


class ToolCallArguments(NamedTuple):
    """More of the arguments of a call, as JSON text."""

    call: int
    text: str


ToolCallEvent = TextDelta | ToolCallStart | ToolCallArguments


class ToolCallParser:
    """Text goes in piece by piece; content, calls and their arguments come out.

    names: the offered tools. format: the tags around calls. Without tags, calls are the whole text.
    """

    def __init__(self, names: frozenset[str], format: ToolFormat = NEMOTRON) -> None:
        self.names = names
        self.calls = 0
        self._open_tag, self._close_tag = format.open, format.close
        self._state: Callable[[str], Iterator[ToolCallEvent]] = self._outside if format.open else self._begin
        self._raw = ""  # what was not emitted, of the block or since its last call
        self._read_of_close = ""  # as much of the closing tag as was read
        self._had_call = False  # whether a call of this block was emitted
        self._object_start = 0  # where the object begins in `_raw`
        self._nesting: list[str] = []
        self._in_string = self._escaped = False

    def push(self, piece: str) -> list[ToolCallEvent]:
        """Add text; returns the events that it makes certain."""
        events: list[ToolCallEvent] = []
        at = 0
        while at < len(piece):
            if not self._raw and self._state == self._outside:  # most text has no tag: up to the next <
                end = piece.find("<", at)
                end = len(piece) if end < 0 else end
                if end > at:
                    events.append(TextDelta(piece[at:end]))
                    at = end
                    continue
            events += self._state(piece[at])
            at += 1
        return merged(events)

    def end(self) -> list[ToolCallEvent]:
        """The text has ended: what did not become a call is content.

        Except after a call that was emitted, where only closing tags are missing.
        """
        if self._state in (self._arguments, self._rest) or (self._had_call and self._state == self._between):
            return []
        return list(self._emit_text(last=True))

    # The states of the parser; each takes one character

    def _begin(self, character: str) -> Iterator[ToolCallEvent]:
        """At the beginning of a text that has no tags around calls."""
        if character == "{":
            self._state = self._between
            yield from self._between(character)
        else:
            self._raw += character
            if not character.isspace():
                yield from self._emit_text()

    def _outside(self, character: str) -> Iterator[ToolCallEvent]:
        self._raw += character
        if self._raw == self._open_tag:
            self._state, self._had_call, self._read_of_close = self._between, False, ""
        elif not self._open_tag.startswith(self._raw):
            yield from self._emit_text()

    def _between(self, character: str) -> Iterator[ToolCallEvent]:
        """Between the tags, outside an object."""
        self._raw += character
        if self._read_of_close or character == "<":
            self._read_of_close += character
            closed = self._read_of_close == self._close_tag
            if closed and self._had_call:
                self._raw, self._state = "", self._outside
            elif closed or not self._close_tag.startswith(self._read_of_close):
                yield from self._emit_text()
        elif character == "{":
            self._object_start, self._nesting, self._in_string = len(self._raw) - 1, ["{"], False
            self._state = self._object
        elif character not in SEPARATORS + "[]":
            yield from self._emit_text()

    def _object(self, character: str) -> Iterator[ToolCallEvent]:
        """Inside an object of which nothing was emitted."""
        self._raw += character
        if not self._track_nesting(character):
            missing_brace = character == "]" and len(self._nesting) == 1
            yield from (
                self._emit_object(self._raw[self._object_start : -1] + "}", rest="]")
                if missing_brace
                else self._emit_text()
            )
        elif not self._nesting:
            yield from self._emit_object(self._raw[self._object_start :])
        elif character == "{" and len(self._nesting) == 2 and not self._in_string:
            found = HEAD.fullmatch(self._raw[self._object_start : -1])
            name = _decoded(found[1]) if found else None
            if name in self.names:
                yield from self._start_call(name)
                yield ToolCallArguments(self.calls - 1, "{")
                self._nesting, self._state = ["{"], self._arguments

    def _arguments(self, character: str) -> Iterator[ToolCallEvent]:
        if not self._in_string and (character == "<" or (character == "]" and len(self._nesting) == 1)):
            # The arguments are broken and end here.
            self._raw, self._read_of_close, self._state = "", "", self._between
            yield from self._between(character)
            return
        written = _escaped(character) if self._in_string else character
        self._track_nesting(character)
        yield ToolCallArguments(self.calls - 1, written)
        if not self._nesting:
            self._nesting, self._state = ["{"], self._rest

    def _rest(self, character: str) -> Iterator[ToolCallEvent]:
        """After the arguments, to the end of the object; other members are ignored."""
        ends = not self._in_string and (character == "<" or (character == "]" and len(self._nesting) == 1))
        if not ends:
            self._track_nesting(character)
        if ends or not self._nesting:
            self._raw, self._read_of_close, self._state = "", "", self._between
            if ends:
                yield from self._between(character)

    # Steps

    def _track_nesting(self, character: str) -> bool:
        """Track strings and brackets; false where a bracket closes one that is not open."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string, self._escaped = True, False
        elif character in "{[":
            self._nesting.append(character)
        elif character in "}]":
            if self._nesting[-1] + character not in ("{}", "[]"):
                return False
            self._nesting.pop()
        return True

    def _emit_object(self, text: str, rest: str = "") -> Iterator[ToolCallEvent]:
        """Emit a whole object, as a call or as content."""
        call = whole_call(text)
        if call is None or call[0] not in self.names:
            yield from self._emit_text()
            return
        yield from self._start_call(call[0])
        yield ToolCallArguments(self.calls - 1, call[1])
        self._raw, self._read_of_close, self._state = rest, "", self._between

    def _start_call(self, name: str) -> Iterator[ToolCallEvent]:
        self._raw, self._had_call = "", True
        self.calls += 1
        yield ToolCallStart(self.calls - 1, name)

    def _emit_text(self, last: bool = False) -> Iterator[ToolCallEvent]:
        """Emit what was read as content; its last character may begin the next tag."""
        held = "<" if self._raw.endswith("<") and not last else ""
        text = self._raw[: len(self._raw) - len(held)]
        if self._had_call:
            text = text.lstrip(SEPARATORS + "[]")
        self._raw, self._read_of_close, self._had_call, self._state = held, "", False, self._outside
        if text:
            yield TextDelta(text)


def whole_call(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a JSON object that is a call, else None.

    The arguments are JSON text as it was written.
    """
    try:
        members = _members(text)
        name = members["name"][0]
        arguments, written = members.get("arguments") or members.get("parameters") or ({}, "{}")
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments, written = {}, "{}"
        if isinstance(arguments, str):
            arguments, written = DECODER.decode(arguments), SURROGATE.sub(_escape, arguments)
        written = STRING.sub(lambda found: CONTROLS.sub(lambda one: _escaped(one[0]), found[0]), written)
    except (ValueError, KeyError, RecursionError):
        return None
    return (name, written) if isinstance(name, str) and isinstance(arguments, dict) else None


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """The members of a JSON object by name, as (value, text of the value).

    Raises ValueError for other text.
    """
    members: dict[str, tuple[Any, str]] = {}
    at = _expect("{", text, 0)
    while text[at : at + 1] != "}":
        if members:
            at = _expect(",", text, at)
        name, at = DECODER.raw_decode(text, at)
        at = _expect(":", text, _skip_white_space(text, at))
        value, end = DECODER.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError("a member without a name")
        members[name] = value, text[at:end]
        at = _skip_white_space(text, end)
    if _skip_white_space(text, at + 1) != len(text):
        raise ValueError("more than an object")
    return members


def _expect(character: str, text: str, at: int) -> int:
    """The position after this character and white space. Raises ValueError where `at` has another one."""
    if text[at : at + 1] != character:
        raise ValueError(f"no {character} at {at}")
    return _skip_white_space(text, at + 1)


def _skip_white_space(text: str, at: int) -> int:
    while text[at : at + 1] in WHITE_SPACE:
        at += 1
    return at


def _escape(surrogate: re.Match[str]) -> str:
    """Half a surrogate pair as an escape of JSON, the only form in which an answer can hold it."""
    return f"\\u{ord(surrogate[0]):04x}"


def _escaped(character: str) -> str:
    """A character inside a JSON string, as JSON allows it: control characters are escapes there."""
    return json.dumps(character)[1:-1] if character < " " else character


DECODER = json.JSONDecoder(parse_constant=refuse_constant, strict=False)  # raw newlines in strings are read
STRING, CONTROLS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL), re.compile(r"[\x00-\x1f]")
WHITE_SPACE = frozenset(" \t\r\n")


def merged(events: Iterable[ToolCallEvent]) -> list[ToolCallEvent]:
    """The same events, with adjacent texts and adjacent arguments of one call joined."""
    result: list[ToolCallEvent] = []
    for event in events:
        before = result[-1] if result else None
        if isinstance(event, TextDelta) and isinstance(before, TextDelta):
            result[-1] = TextDelta(before.text + event.text)
        elif (
            isinstance(event, ToolCallArguments)
            and isinstance(before, ToolCallArguments)
            and event.call == before.call
        ):
            result[-1] = ToolCallArguments(event.call, before.text + event.text)
        else:
            result.append(event)
    return result


def _decoded(literal: str) -> str | None:
    try:
        return str(json.loads(literal))
    except ValueError:
        return None
