"""Structured output over HTTP: the fields of a request as the engine's `StructuredOutputs`.

They come as OpenAI's `response_format` and `tool_choice`, or as vLLM's `structured_outputs` (and its older
`guided_regex`).
"""

import json
from typing import TYPE_CHECKING, Any

from nanohybrid.engine import StructuredOutputs
from nanohybrid.engine.structured_output import COMPACT_JSON
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.schemas import ChatRequest, Decoding, NamedTool
from nanohybrid.serve.xml_tools import argument
from nanohybrid.text.tool_format import HERMES, JSON, NEMOTRON, XML, ToolFormat

if TYPE_CHECKING:
    from nanohybrid.serve.limits import Limits

# What stands before and after the object of a call.
_BRACKETS = {
    NEMOTRON: ("<TOOLCALL>[", "]</TOOLCALL>"),
    HERMES: ("<tool_call>\n", "\n</tool_call>"),
    XML: ("", ""),
    JSON: ("", ""),
}


def check_structured_outputs(body: Decoding, limits: "Limits") -> None:
    """Refuse (ApiError 400) fields that exceed the limits, contradict each other, or lack a schema."""
    asked = [name for name, value in _asked(body).items() if value]
    if len(asked) > 1:
        raise ApiError(400, f"{asked[1]} contradicts {asked[0]}: give one of the two", asked[1])
    if asked and body.ignore_eos:
        raise ApiError(
            400, f"ignore_eos contradicts {asked[0]}: an answer that is complete must end", "ignore_eos"
        )
    kind = body.response_format if isinstance(body, ChatRequest) else None
    if kind is not None and kind.type == "json_schema":
        if kind.json_schema is None:
            raise ApiError(400, "response_format.json_schema is missing", "response_format.json_schema")
        limits.schema(kind.json_schema.schema_, "response_format.json_schema.schema")
    given = body.structured_outputs
    if given is not None:
        limits.schema(given.json_, "structured_outputs.json")
        size = sum(len(text.encode("utf-8", "replace")) for text in given.choice or ())
        limits.count(size, "max_regex_bytes", "structured_outputs.choice", "bytes")
    pattern = _regex(body)
    limits.regex(
        pattern or "", "guided_regex" if body.guided_regex is not None else "structured_outputs.regex"
    )


def structured_outputs(body: Decoding, tool_format: ToolFormat = NEMOTRON) -> StructuredOutputs | None:
    """What the answer must match; None where the request has no constraint.

    tool_format: how the model writes a call that it must make. Raises InputError where a schema is not JSON.
    """
    if isinstance(body, ChatRequest):
        if tools := _forced_tools(body):
            return StructuredOutputs(grammar=tool_call_grammar(tools, tool_format))
        kind = body.response_format
        if kind is not None and kind.type == "json_object":
            return StructuredOutputs(json_object=True)
        if kind is not None and kind.json_schema is not None and kind.type == "json_schema":
            return StructuredOutputs(json=kind.json_schema.schema_)
    given = body.structured_outputs
    if given is not None and given.json_ is not None:
        return StructuredOutputs(json=given.json_)
    if given is not None and given.choice is not None:
        return StructuredOutputs(choice=given.choice)
    pattern = _regex(body)
    return None if pattern is None else StructuredOutputs(regex=pattern)


def tool_call_grammar(tools: dict[str, dict[str, Any]], format: ToolFormat = NEMOTRON) -> str:
    """A Lark grammar of one call of one of these tools. tools: names and JSON schemas of their arguments."""
    lines = [f"start: {' | '.join(f'call{index}' for index in range(len(tools)))}"]
    before, after = _BRACKETS[format]
    for index, (name, schema) in enumerate(tools.items()):
        if format == XML:
            lines += _xml_call(index, name, schema)
            continue
        head = json.dumps(f'{before}{{"name": {json.dumps(name)}, "{format.arguments}": ')
        lines.append(f"call{index}: {head} arguments{index} {json.dumps('}' + after)}")
        lines.append(f"arguments{index}: {_json_rule({'type': 'object', **schema})}")
    return "\n".join(lines)


def _xml_call(index: int, name: str, schema: dict[str, Any]) -> list[str]:
    """The rules of a call in the format xml: its parameters in the order of the schema."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    rules, parts = [], []
    for at, (key, kind) in enumerate(properties.items()):
        rule = f"parameter{index}_{at}"
        head = json.dumps(f"<parameter={key}>\n")
        if argument("", kind) == "" and not kind.get("enum") and "const" not in kind:  # any text
            rules.append(f"{rule}: {head} text{index}_{at}")
            rules.append(f'text{index}_{at}[suffix="\\n</parameter>\\n"]: /(?s:.*)/')
        elif kind.get("enum") and all(isinstance(value, str) for value in kind["enum"]):
            values = " | ".join(json.dumps(value) for value in kind["enum"])
            rules.append(f'{rule}: {head} ({values}) "\\n</parameter>\\n"')
        else:
            rules.append(f'{rule}: {head} json{index}_{at} "\\n</parameter>\\n"')
            rules.append(f"json{index}_{at}: {_json_rule(kind)}")
        parts.append(rule if key in required else f"{rule}?")
    head, tail = json.dumps(f"<tool_call>\n<function={name}>\n"), json.dumps("</function>\n</tool_call>")
    return [f"call{index}: {' '.join([head, *parts, tail])}", *rules]


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': COMPACT_JSON})}"


def _regex(body: Decoding) -> str | None:
    """The regular expression, by either name."""
    given = body.structured_outputs
    return given.regex if given is not None and given.regex is not None else body.guided_regex


def _forced_tools(body: ChatRequest) -> dict[str, dict[str, Any]]:
    """The tools of which one must be called, with the schemas of their arguments; often empty."""
    choice = body.tool_choice
    if choice != "required" and not isinstance(choice, NamedTool):
        return {}
    functions = [tool.function for tool in body.tools or ()]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
    return {function.name: function.parameters or {} for function in functions}


def _asked(body: Decoding) -> dict[str, bool]:
    """The fields that can ask for structured output, and whether the request uses them."""
    chat = body if isinstance(body, ChatRequest) else None
    return {
        "tool_choice": chat is not None and bool(_forced_tools(chat)),
        "response_format": chat is not None
        and chat.response_format is not None
        and chat.response_format.type != "text",
        "structured_outputs": body.structured_outputs is not None,
        "guided_regex": body.guided_regex is not None,
    }
