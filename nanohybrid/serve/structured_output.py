"""The forms that an answer can be held to: JSON of a schema, a regular expression, one of some texts, a call of a tool.

They come as OpenAI's `response_format` and `tool_choice`, or as vLLM's `structured_outputs` (and its older `guided_regex`).
"""

from typing import TYPE_CHECKING, Any

from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.schemas import ChatRequest, Decoding, NamedTool

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from nanohybrid.engine.structured_output import Grammars
    from nanohybrid.serve.limits import Limits

ANY_OBJECT = {"type": "object"}


def check(body: Decoding, limits: "Limits") -> None:
    """Refuse a form that is too large, that contradicts another, or that does not say what it is."""
    asked = [name for name, value in _asked(body).items() if value]
    if len(asked) > 1:
        raise ApiError(400, f"{asked[1]} contradicts {asked[0]}: an answer has one form", asked[1])
    if asked and body.ignore_eos:
        raise ApiError(400, "ignore_eos contradicts a form that the answer must have", "ignore_eos")
    kind = body.response_format if isinstance(body, ChatRequest) else None
    if kind is not None and kind.type == "json_schema":
        if kind.json_schema is None:
            raise ApiError(400, "response_format.json_schema is missing", "response_format.json_schema")
        limits.schema(kind.json_schema.schema_, "response_format.json_schema.schema")
    form = body.structured_outputs
    if form is not None:
        limits.schema(form.json_, "structured_outputs.json")
        limits.count(
            sum(len(text.encode("utf-8", "replace")) for text in form.choice or ()),
            "max_regex_bytes",
            "structured_outputs.choice",
            "bytes",
        )
    limits.regex(
        regex_of(body) or "", "guided_regex" if body.guided_regex is not None else "structured_outputs.regex"
    )


def held(body: Decoding) -> bool:
    """Whether a grammar must hold the answer."""
    return any(_asked(body).values())


def grammar(body: Decoding, grammars: "Grammars") -> "LLMatcher":
    """The grammar of the one form; for a worker, since compiling takes its time. Raises InputError where it cannot be kept."""
    if isinstance(body, ChatRequest):
        if tools := forced_tools(body):
            return grammars.call(tools)
        kind = body.response_format
        if kind is not None and kind.type != "text":
            return grammars.schema(kind.json_schema.schema_ if kind.json_schema else ANY_OBJECT)
    form = body.structured_outputs
    if form is not None and form.json_ is not None:
        return grammars.schema(form.json_)
    if form is not None and form.choice is not None:
        return grammars.choice(form.choice)
    return grammars.regex(regex_of(body) or "")


def regex_of(body: Decoding) -> str | None:
    """The regular expression, by either name."""
    form = body.structured_outputs
    return form.regex if form is not None and form.regex is not None else body.guided_regex


def forced_tools(body: ChatRequest) -> dict[str, dict[str, Any]]:
    """The tools of which one must be called, with their schemas; none where the model is free."""
    choice = body.tool_choice
    if choice != "required" and not isinstance(choice, NamedTool):
        return {}
    functions = [tool.function for tool in body.tools or ()]
    wanted = [
        one
        for one in functions
        if choice == "required" or (isinstance(choice, NamedTool) and one.name == choice.function.name)
    ]
    return {function.name: function.parameters or {} for function in wanted}


def _asked(body: Decoding) -> dict[str, bool]:
    """Every way to ask for a form, and whether it was used."""
    chat = body if isinstance(body, ChatRequest) else None
    return {
        "tool_choice": chat is not None and bool(forced_tools(chat)),
        "response_format": chat is not None
        and chat.response_format is not None
        and chat.response_format.type != "text",
        "structured_outputs": body.structured_outputs is not None,
        "guided_regex": body.guided_regex is not None,
    }
