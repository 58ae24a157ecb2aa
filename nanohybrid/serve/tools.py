"""Tool calls out of a stream of text: `<TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>`.

The reader looks at one character at a time and never back, so a text cut anywhere gives what the whole gives. A call is let
out as soon as its name and the brace of its arguments are there, and its arguments then as they are written. Repaired is what
has one meaning only: missing brackets and closing tags, arguments as a JSON text in a string, members in another order,
`parameters` for `arguments`. What was not recognized by then (no JSON, a tool that was not offered) is content, as the model
wrote it. Arguments that turn out to be broken after they were let out stay as they were written, as with OpenAI's own API.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from nanohybrid.strict_json import SURROGATE, refuse_constant

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')
BLANK = " \t\r\n,"


class Text(NamedTuple):
    """Text that is no call."""

    text: str


class CallBegins(NamedTuple):
    call: int
    name: str


class Arguments(NamedTuple):
    """More of a call's arguments, as JSON text."""

    call: int
    text: str


Event = Text | CallBegins | Arguments


class ToolReader:
    """Text goes in by pieces; text, calls and their arguments come out. `names` are the tools that were offered."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.calls = 0
        self._state: Callable[[str], Iterator[Event]] = self._outside
        self._raw = ""  # what is not let out: of the block, or since its last call
        self._close_tag = ""  # how much of the closing tag is there
        self._known = False  # whether this block had a call
        self._start = 0  # where in _raw the object begins
        self._nesting: list[str] = []
        self._string = self._escaped = False

    def push(self, piece: str) -> list[Event]:
        """What this piece makes certain."""
        events: list[Event] = []
        at = 0
        while at < len(piece):
            if (
                not self._raw and self._state == self._outside
            ):  # most text has no tag: up to the next < in one go
                end = piece.find("<", at)
                end = len(piece) if end < 0 else end
                if end > at:
                    events.append(Text(piece[at:end]))
                    at = end
                    continue
            events += self._state(piece[at])
            at += 1
        return merged(events)

    def end(self) -> list[Event]:
        """The end of the text: what may have become a call is text, unless a call was let out and only closing tags are missing."""
        if self._state in (self._arguments, self._rest) or (self._known and self._state == self._between):
            return []
        return list(self._give_up(last=True))

    # Where we are; each takes one character

    def _outside(self, character: str) -> Iterator[Event]:
        self._raw += character
        if self._raw == OPEN:
            self._state, self._known, self._close_tag = self._between, False, ""
        elif not OPEN.startswith(self._raw):
            yield from self._give_up()

    def _between(self, character: str) -> Iterator[Event]:
        """Inside the tags and outside an object."""
        self._raw += character
        if self._close_tag or character == "<":
            self._close_tag += character
            if self._close_tag == CLOSE and self._known:
                self._raw, self._state = "", self._outside
            elif self._close_tag == CLOSE or not CLOSE.startswith(self._close_tag):
                yield from self._give_up()
        elif character == "{":
            self._start, self._nesting, self._string = len(self._raw) - 1, ["{"], False
            self._state = self._object
        elif character not in BLANK + "[]":
            yield from self._give_up()

    def _object(self, character: str) -> Iterator[Event]:
        """Inside an object of which nothing is let out."""
        self._raw += character
        if not self._follow(character):
            missing_brace = character == "]" and len(self._nesting) == 1
            yield from (
                self._let_out(self._raw[self._start : -1] + "}", rest="]")
                if missing_brace
                else self._give_up()
            )
        elif not self._nesting:
            yield from self._let_out(self._raw[self._start :])
        elif character == "{" and len(self._nesting) == 2 and not self._string:
            found = HEAD.fullmatch(self._raw[self._start : -1])
            name = _text_of(found[1]) if found else None
            if name in self.names:
                yield from self._begin(name)
                yield Arguments(self.calls - 1, "{")
                self._nesting, self._state = ["{"], self._arguments

    def _arguments(self, character: str) -> Iterator[Event]:
        if not self._string and (character == "<" or (character == "]" and len(self._nesting) == 1)):
            self._raw, self._close_tag, self._state = "", "", self._between  # broken: it ends here
            yield from self._between(character)
            return
        self._follow(character)
        yield Arguments(self.calls - 1, character)
        if not self._nesting:
            self._nesting, self._state = ["{"], self._rest

    def _rest(self, character: str) -> Iterator[Event]:
        """After the arguments, to the end of the object; what else it says is not used."""
        ends = not self._string and (character == "<" or (character == "]" and len(self._nesting) == 1))
        if not ends:
            self._follow(character)
        if ends or not self._nesting:
            self._raw, self._close_tag, self._state = "", "", self._between
            if ends:
                yield from self._between(character)

    # Steps

    def _follow(self, character: str) -> bool:
        """Keep track of strings and brackets; false, and nothing done, where a bracket closes what is not open."""
        if self._string:
            self._string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._string, self._escaped = True, False
        elif character in "{[":
            self._nesting.append(character)
        elif character in "}]":
            if self._nesting[-1] + character not in ("{}", "[]"):
                return False
            self._nesting.pop()
        return True

    def _let_out(self, text: str, rest: str = "") -> Iterator[Event]:
        """A whole object: a call, or content."""
        call = whole_call(text)
        if call is None or call[0] not in self.names:
            yield from self._give_up()
            return
        yield from self._begin(call[0])
        yield Arguments(self.calls - 1, call[1])
        self._raw, self._close_tag, self._state = rest, "", self._between

    def _begin(self, name: str) -> Iterator[Event]:
        self._raw, self._known = "", True
        self.calls += 1
        yield CallBegins(self.calls - 1, name)

    def _give_up(self, last: bool = False) -> Iterator[Event]:
        """It was text; its last character may begin the next tag."""
        keep = "<" if self._raw.endswith("<") and not last else ""
        text = self._raw[: len(self._raw) - len(keep)]
        if self._known:
            text = text.lstrip(BLANK + "[]")
        self._raw, self._close_tag, self._known, self._state = keep, "", False, self._outside
        if text:
            yield Text(text)


def whole_call(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a JSON object that is a call; None of any other. The arguments are JSON text, as the model wrote it."""
    try:
        members = _members(text)
        name = members["name"][0]
        arguments, written = members.get("arguments") or members.get("parameters") or ({}, "{}")
        if isinstance(arguments, str):
            arguments, written = DECODER.decode(arguments), SURROGATE.sub(_escape, arguments)
    except (ValueError, KeyError, RecursionError):
        return None
    return (name, written) if isinstance(name, str) and isinstance(arguments, dict) else None


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """The members of a JSON object by name, each as its value and the text of its value. Raises ValueError where it is none."""
    members: dict[str, tuple[Any, str]] = {}
    at = _expect("{", text, 0)
    while text[at : at + 1] != "}":
        if members:
            at = _expect(",", text, at)
        name, at = DECODER.raw_decode(text, at)
        at = _expect(":", text, _after_blanks(text, at))
        value, end = DECODER.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError("a member without a name")
        members[name] = value, text[at:end]
        at = _after_blanks(text, end)
    if _after_blanks(text, at + 1) != len(text):
        raise ValueError("more than an object")
    return members


def _expect(character: str, text: str, at: int) -> int:
    """Where the text goes on after this character and blanks. Raises ValueError where something else stands at `at`."""
    if text[at : at + 1] != character:
        raise ValueError(f"no {character} at {at}")
    return _after_blanks(text, at + 1)


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in JSON_BLANKS:
        at += 1
    return at


def _escape(surrogate: re.Match[str]) -> str:
    """Half a surrogate pair as JSON's escape: the one form in which an answer can hold it."""
    return f"\\u{ord(surrogate[0]):04x}"


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
JSON_BLANKS = frozenset(" \t\r\n")


def merged(events: Iterable[Event]) -> list[Event]:
    """Neighboring texts, and neighboring arguments of one call, as one."""
    result: list[Event] = []
    for event in events:
        before = result[-1] if result else None
        if isinstance(event, Text) and isinstance(before, Text):
            result[-1] = Text(before.text + event.text)
        elif isinstance(event, Arguments) and isinstance(before, Arguments) and event.call == before.call:
            result[-1] = Arguments(event.call, before.text + event.text)
        else:
            result.append(event)
    return result


def _text_of(literal: str) -> str | None:
    try:
        return str(json.loads(literal))
    except ValueError:
        return None
