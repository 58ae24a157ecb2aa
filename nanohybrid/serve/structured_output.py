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
from nanohybrid.serve.tools import CLOSE, OPEN

if TYPE_CHECKING:
    from nanohybrid.serve.limits import Limits


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


def structured_outputs(body: Decoding) -> StructuredOutputs | None:
    """What the answer must match; None where the request has no constraint.

    Raises InputError where a schema is not JSON.
    """
    if isinstance(body, ChatRequest):
        if tools := _forced_tools(body):
            return StructuredOutputs(grammar=tool_call_grammar(tools))
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


def tool_call_grammar(tools: dict[str, dict[str, Any]]) -> str:
    """A Lark grammar of one call of one of these tools. tools: names and JSON schemas of their arguments."""
    lines = [f"start: {' | '.join(f'call{index}' for index in range(len(tools)))}"]
    for index, (name, schema) in enumerate(tools.items()):
        head = json.dumps(f'{OPEN}[{{"name": {json.dumps(name)}, "arguments": ')
        arguments = json.dumps({"type": "object", **schema, "x-guidance": COMPACT_JSON})
        lines.append(f'call{index}: {head} arguments{index} "}}]{CLOSE}"')
        lines.append(f"arguments{index}: %json {arguments}")
    return "\n".join(lines)


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
