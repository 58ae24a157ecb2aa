"""How a model writes tool calls: the format that its chat template shows it.

    nemotron  Nemotron Nano 2         <TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>
    hermes    Qwen3, Hermes           <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    xml       Nemotron 3, Qwen3-Coder <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...
    json      Llama 3                 {"name": ..., "parameters": {...}}

Calls of the last are the whole answer; the others stand between their tags.
"""

import re
from typing import NamedTuple


class ToolFormat(NamedTuple):
    """A format. open, close: the tags around calls; empty where there are none."""

    name: str
    open: str
    close: str
    arguments: str = "arguments"  # the member of a call's object that holds its arguments


NEMOTRON = ToolFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>")
HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
XML = ToolFormat("xml", "<tool_call>", "</tool_call>")
JSON = ToolFormat("json", "", "", "parameters")


def tool_format(source: str) -> ToolFormat | None:
    """The format in the source of a chat template; None where it shows none of them."""
    if "<TOOLCALL>" in source:
        return NEMOTRON
    if "<tool_call>" in source and "<arg_key>" not in source:
        return XML if "<function=" in source else HERMES
    return JSON if re.search(r'"name": .{0,80}"parameters": ', source) else None
