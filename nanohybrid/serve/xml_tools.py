"""Parses tool calls of the format xml in a stream of text; Nemotron 3 and Qwen3-Coder write it.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A call is emitted when its function's tag was read, and each parameter when its closing tag was read. The
result does not depend on how the text was cut. A value is text; the tool's schema says whether it is a JSON
value of another type. Missing tags have one meaning and are repaired: a call without `<tool_call>`, a
parameter that ends where the next tag begins, a function that ends with `</tool_call>`. What is no call
(other text, or a tool that was not offered) is content, as the model wrote it.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from nanohybrid.serve.tools import TextDelta, ToolCallArguments, ToolCallEvent, ToolCallStart, merged
from nanohybrid.strict_json import SURROGATE, refuse_constant
from nanohybrid.text.tool_format import XML

OPEN, CLOSE = XML.open, XML.close
FUNCTION_OPEN, FUNCTION_CLOSE = "<function=", "</function>"
PARAMETER_OPEN, PARAMETER_CLOSE = "<parameter=", "</parameter>"
LONGEST_NAME = 200  # a tag with a longer name is text
FUNCTION = re.compile(FUNCTION_OPEN + r"([^<>\n]{1,200})>")
PARAMETER = re.compile(PARAMETER_OPEN + r"([^<>\n]{1,200})>")
VALUE_ENDS = (PARAMETER_CLOSE, f"\n{PARAMETER_OPEN}", f"\n{FUNCTION_CLOSE}", f"\n{CLOSE}")
Schema = Mapping[str, Any]


class XmlToolCallParser:
    """Text goes in piece by piece; content, calls and their arguments come out.

    tools: the JSON schema of each offered tool's arguments, by its name.
    """

    def __init__(self, tools: Mapping[str, Schema]) -> None:
        self.tools = tools
        self.calls = 0
        self._buffer = ""  # read and not emitted
        self._state: Callable[[bool], list[ToolCallEvent]] = self._outside
        self._schema: Schema = {}  # of this call's arguments
        self._parameters = 0  # emitted, of this call
        self._key = ""  # of the parameter that is read
        self._searched = 0  # up to here a value has no end

    def push(self, piece: str) -> list[ToolCallEvent]:
        """Add text; returns the events that it makes certain."""
        self._buffer += piece
        return self._run(last=False)

    def end(self) -> list[ToolCallEvent]:
        """The text has ended: what did not become a call is content. A call that was cut stays cut."""
        return self._run(last=True)

    def _run(self, last: bool) -> list[ToolCallEvent]:
        events: list[ToolCallEvent] = []
        before = None
        while before != (before := (len(self._buffer), self._state)):
            events += self._state(last)
        return merged(events)

    # The states: each takes from the buffer what is certain

    def _outside(self, last: bool) -> list[ToolCallEvent]:
        """Content, up to a tag that begins a call or may become one."""
        at = self._buffer.find("<")
        while at >= 0:
            begins = self._buffer.startswith(OPEN, at) or FUNCTION.match(self._buffer, at)
            if begins or (not last and _may_become(self._buffer[at:], OPEN, FUNCTION_OPEN)):
                break
            at = self._buffer.find("<", at + 1)
        text = self._take(len(self._buffer) if at < 0 else at)
        if self._buffer.startswith(OPEN) or FUNCTION.match(self._buffer):
            self._state = self._block
        return [TextDelta(text)] if text else []

    def _block(self, last: bool) -> list[ToolCallEvent]:
        """At a tag that begins a call: that of an offered function must follow."""
        body = self._buffer.removeprefix(OPEN).lstrip()
        found = FUNCTION.match(body)
        name = found[1].strip() if found else ""
        if found and name in self.tools:
            self._buffer = body[found.end() :]
            self._schema, self._parameters, self._state = self.tools[name], 0, self._function
            self.calls += 1
            return [ToolCallStart(self.calls - 1, name), ToolCallArguments(self.calls - 1, "{")]
        if last or found or (body and not _may_become(body, FUNCTION_OPEN)):
            self._state = self._outside
            return [TextDelta(self._take(self._buffer.find(">") + 1))]
        return []

    def _function(self, last: bool) -> list[ToolCallEvent]:
        """Inside a function, between parameters. Other text has no meaning there."""
        self._buffer = self._buffer.lstrip()
        found = PARAMETER.match(self._buffer)
        if found:
            self._key, self._searched, self._state = found[1].strip(), 0, self._value
            self._buffer = self._buffer[found.end() :]
        elif self._buffer.startswith((FUNCTION_CLOSE, CLOSE)):
            self._buffer = self._buffer.removeprefix(FUNCTION_CLOSE)
            self._state = self._after
            return [ToolCallArguments(self.calls - 1, "}")]
        elif last or not _may_become(self._buffer, FUNCTION_CLOSE, CLOSE, PARAMETER_OPEN):
            following = self._buffer.find("<", 1)
            self._take(len(self._buffer) if following < 0 else following)
        return []

    def _value(self, last: bool) -> list[ToolCallEvent]:
        """The text of a parameter, up to its closing tag or to the tag that follows it."""
        ends = [found for end in VALUE_ENDS if (found := self._buffer.find(end, self._searched)) >= 0]
        if not ends:
            self._searched = max(len(self._buffer) - len(PARAMETER_CLOSE) - 1, 0)
            self._take(len(self._buffer) if last else 0)
            return []
        text = self._take(min(ends)).removeprefix("\n").removesuffix("\n")
        self._buffer, self._state = self._buffer.removeprefix(PARAMETER_CLOSE), self._function
        value = argument(text, (self._schema.get("properties") or {}).get(self._key))
        before = ", " if self._parameters else ""
        self._parameters += 1
        return [ToolCallArguments(self.calls - 1, f"{before}{_as_json(self._key)}: {_as_json(value)}")]

    def _after(self, last: bool) -> list[ToolCallEvent]:
        """After a function: the end of the block, another function, or content."""
        body = self._buffer.lstrip()
        if body.startswith(CLOSE):
            self._buffer, self._state = body[len(CLOSE) :], self._outside
        elif FUNCTION.match(body):
            self._buffer, self._state = body, self._block
        elif last or (body and not _may_become(body, CLOSE, FUNCTION_OPEN)):
            self._state = self._outside
        return []

    def _take(self, count: int) -> str:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        return text


def argument(text: str, schema: Any) -> Any:
    """The value that a parameter's text stands for, by its JSON schema.

    A string stays text. Other types are read as JSON; text that is none stays text.
    """
    types = _types(schema)
    if "null" in types and text.lower() in ("null", "none"):
        return None
    if "string" in types or (not types and not text.lstrip().startswith(("{", "["))):
        return text
    if "boolean" in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return text


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names; empty where it names none."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    types = {given} if isinstance(given, str) else {one for one in given or () if isinstance(one, str)}
    for option in (*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())):
        types |= _types(option)
    values = (*(schema.get("enum") or ()), schema.get("const"))
    return types | ({"string"} if any(isinstance(value, str) for value in values) else set())


def _may_become(text: str, *tags: str) -> bool:
    """Whether more text may make one of these tags of `text`; a tag that ends in = has a name to come."""
    for tag in tags:
        if tag.startswith(text):
            return True
        name = text.removeprefix(tag)
        if tag.endswith("=") and len(name) < len(text) and len(name) <= LONGEST_NAME:
            return not re.search(r"[<>\n]", name)
    return False


def _as_json(value: Any) -> str:
    """A value as JSON text; half a surrogate pair becomes an escape, since UTF-8 cannot hold it."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if SURROGATE.search(text) else text
