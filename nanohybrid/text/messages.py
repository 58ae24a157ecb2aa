"""Messages of the OpenAI API: validation, and conversion to one form for templates."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanohybrid.errors import InputError

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")


def checked(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages with string contents. Raises InputError, naming the message, for a bad one."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InputError(
            f"messages must be a list of objects with role and content, not {type(messages).__name__}"
        )
    return [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools as dictionaries, or None for none.

    Raises InputError, naming the tool, for one that is not an object.
    """
    if not tools:
        return None
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence):
        raise InputError(f"tools must be a list of function schemas, not {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InputError(
                f"tools[{index}] must be an object (a function schema), not {type(tool).__name__}"
            )
    return [dict(tool) for tool in tools]


class JsonObject(dict[str, Any]):
    """A JSON object whose text is JSON, so that a template that joins it to a string writes JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def with_argument_objects(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Copies of checked messages whose tool calls have their arguments as objects, also where they are text.

    Text that is not a JSON object stays as it is. None: there are no such arguments.
    """
    result, found = [], False
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            inner = call.get("function", call)
            value = _object(inner.get("arguments"))
            if value is not None:
                found, inner = True, {**inner, "arguments": value}
            calls.append({**call, "function": inner} if "function" in call else inner)
        result.append({**message, "tool_calls": calls} if calls else dict(message))
    return result if found else None


def _object(arguments: Any) -> JsonObject | None:
    if isinstance(arguments, Mapping):
        return JsonObject((str(key), _nested(value)) for key, value in arguments.items())
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments, object_hook=JsonObject)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, JsonObject) else None


def _nested(value: Any) -> Any:
    return _object(value) if isinstance(value, Mapping) else value


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r}; it is one of {', '.join(ROLES)}")
    calls = _calls(message.get("tool_calls"), role, where)
    content = message.get("content")
    if content is None and calls:
        content = ""
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {
        **rest,
        "role": role,
        "content": _text(content, where),
        **({"tool_calls": calls} if calls else {}),
    }


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(
            f"{where}: content must be a string or a list of text parts, not {type(content).__name__}"
        )
    return "".join(_part(part, f"{where}: content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f'{where}: only parts {{"type": "text", "text": ...}} can be read, not {kind!r}')


def _calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if not calls:
        return []
    if role != "assistant":
        raise InputError(f"{where}: only an assistant message has tool_calls, not one of role {role!r}")
    if not isinstance(calls, (list, tuple)):
        raise InputError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    return [_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} must be an object with a function name and arguments")
    if not isinstance(function.get("arguments", {}), (str, Mapping)):
        raise InputError(
            f"{where}: arguments must be an object or JSON text, not {type(function['arguments']).__name__}"
        )
    return dict(call)
