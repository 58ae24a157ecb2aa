"""`/v1/responses`: OpenAI's newer API for conversations.

A request is translated to a chat, its output to items.

Nothing is stored: a client continues a conversation by sending its items again.
"""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Request as HttpRequest
from pydantic import Field, ValidationError
from starlette.responses import JSONResponse, Response

from nanohybrid.serve.chat import ChatAnswer, new_call_id
from nanohybrid.serve.errors import ApiError, validation_error
from nanohybrid.serve.output_parser import OutputDelta, ReasoningDelta
from nanohybrid.serve.schemas import ChatRequest, Count, Effort, Ignored, Loose, TemplateArguments
from nanohybrid.serve.service import Service
from nanohybrid.serve.sse import EventStream, run_until_disconnect, sse_event
from nanohybrid.serve.tools import TextDelta, ToolCallStart


class InputText(Loose):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Loose):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


class FunctionCall(Loose):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutput(Loose):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class Reasoning(Loose):
    """The reasoning of an earlier turn: accepted, and not shown to the model again."""

    type: Literal["reasoning"]


class ReasoningOptions(Loose):
    effort: Effort | None = None


class ResponseTool(Loose):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChosenTool(Loose):
    type: Literal["function"]
    name: str


class TextOptions(Loose):
    format: dict[str, Any] | None = None


SAME = {
    "temperature",
    "top_p",
    "thinking_budget",
    "max_thinking_tokens",
    "thinking_grace",
    "chat_template_kwargs",
}
Item = InputMessage | FunctionCall | FunctionOutput | Reasoning


class ResponseRequest(Ignored):
    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool = False
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    thinking_budget: Count | None = None
    max_thinking_tokens: Count | None = None
    thinking_grace: Count | None = None
    chat_template_kwargs: TemplateArguments | None = None


async def respond(service: Service, body: ResponseRequest, request: HttpRequest) -> Response:
    """Answer a request. Raises ApiError before the first byte of a stream where the request is refused."""
    try:
        asked = ChatRequest.model_validate(as_chat(body))
    except ValidationError as error:
        raise validation_error(error.errors()) from None
    answer = ResponseAnswer(await ChatAnswer.begin(service, asked, request.scope), body)
    if body.stream:
        return EventStream(answer.events(), answer.chat.generation.close, service.limits.request_seconds)
    try:
        return JSONResponse(
            await run_until_disconnect(request, answer.response(), service.limits.request_seconds)
        )
    finally:
        answer.chat.generation.close()


def as_chat(body: ResponseRequest) -> dict[str, Any]:
    """The same request in the format of `/v1/chat/completions`.

    Raises ApiError 400 where it has no message.
    """
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": body.instructions}] if body.instructions else []
    )
    for item in (
        [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    ):
        match item:
            case InputMessage():
                messages.append({"role": item.role, "content": _plain(item.content)})
            case FunctionCall():
                call = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                if not (messages and messages[-1]["role"] == "assistant"):
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(call)
            case FunctionOutput():
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": _plain(item.output)}
                )
    if not messages:
        raise ApiError(400, "input has nothing to answer", "input")
    tools = [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in body.tools or ()
    ]
    form = body.text.format if body.text else None
    if form and form.get("type") == "json_schema":
        form = {
            "type": "json_schema",
            "json_schema": {key: value for key, value in form.items() if key != "type"},
        }
    choice: Any = body.tool_choice
    if isinstance(choice, ChosenTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    fields = {
        "model": body.model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_tokens": body.max_output_tokens,
        "stream": body.stream,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "response_format": form,
        **body.model_dump(include=SAME),
    }
    return {key: value for key, value in fields.items() if value is not None}


def _plain(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ResponseAnswer:
    """One response, whose items grow while the answer is written."""

    def __init__(self, chat: ChatAnswer, body: ResponseRequest) -> None:
        self.chat, self.body = chat, body
        self.items: list[dict[str, Any]] = []
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._number = -1

    async def response(self) -> dict[str, Any]:
        """The whole answer as one object."""
        async for _, _, outputs in self.chat.outputs():
            for output in outputs:
                self._add(output)
        self._close()
        return self._response(self._status())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        async for _, delta, outputs in self.chat.outputs():
            for output in outputs:
                for event in self._add(output):
                    yield event
            if delta.completion is not None:
                for event in self._close():
                    yield event
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _add(self, output: OutputDelta) -> list[bytes]:
        """Add a delta to the item it belongs to, which may be a new one; returns the events."""
        events: list[bytes] = []
        kind = "function_call"
        if isinstance(output, ReasoningDelta | TextDelta):
            kind = "reasoning" if isinstance(output, ReasoningDelta) else "message"
        if isinstance(output, ToolCallStart) or not self.items or self.items[-1]["type"] != kind:
            events += self._close()
            events += self._begin(kind, output.name if isinstance(output, ToolCallStart) else "")
        if isinstance(output, ToolCallStart):
            return events
        item, at, text = self.items[-1], self._at(), output.text
        if kind == "function_call":
            item["arguments"] += text
            return [*events, self._event("response.function_call_arguments.delta", **at, delta=text)]
        item["content"][0]["text"] += text
        return [*events, self._event(f"response.{_text(kind)}.delta", **at, content_index=0, delta=text)]

    def _begin(self, kind: str, name: str) -> list[bytes]:
        item: dict[str, Any] = {
            "id": f"{kind}_{uuid.uuid4().hex[:24]}",
            "type": kind,
            "status": "in_progress",
        }
        if kind == "function_call":
            item |= {"call_id": new_call_id(), "name": name, "arguments": ""}
        else:
            item["content"] = []
            item["summary" if kind == "reasoning" else "role"] = [] if kind == "reasoning" else "assistant"
        self.items.append(item)
        events = [self._event("response.output_item.added", output_index=len(self.items) - 1, item=item)]
        if kind != "function_call":
            part: dict[str, Any] = {"type": _text(kind), "text": ""} | (
                {"annotations": []} if kind == "message" else {}
            )
            item["content"] = [part]
            events.append(
                self._event("response.content_part.added", **self._at(), content_index=0, part=part)
            )
        return events

    def _close(self) -> list[bytes]:
        """Complete the last item; returns the events."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item, at = self.items[-1], self._at()
        item["status"] = "completed"
        if item["type"] == "function_call":
            item["arguments"] = item["arguments"] or "{}"
            done = [
                self._event(
                    "response.function_call_arguments.done",
                    **at,
                    arguments=item["arguments"],
                    name=item["name"],
                )
            ]
        else:
            part = item["content"][0]
            done = [
                self._event(f"response.{_text(item['type'])}.done", **at, content_index=0, text=part["text"]),
                self._event("response.content_part.done", **at, content_index=0, part=part),
            ]
        return [*done, self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)]

    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _status(self) -> str:
        return "incomplete" if self.chat.completions[0].finish_reason == "length" else "completed"

    def _event(self, kind: str, **more: Any) -> bytes:
        self._number += 1
        extra: dict[str, Any] = {"logprobs": []} if kind.startswith("response.output_text.") else {}
        return sse_event({"type": kind, "sequence_number": self._number, **more, **extra}, event=kind)

    def _response(self, status: str) -> dict[str, Any]:
        body, ended = self.body, bool(self.chat.completions)
        answer = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.chat.service.settings.model_name,
            "output": self.items,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"strict": None, **tool.model_dump()} for tool in body.tools or ()],
        }
        if isinstance(body.tool_choice, ChosenTool):
            answer["tool_choice"] = body.tool_choice.model_dump()
        if ended:
            used = self.chat.usage()
            answer["usage"] = {
                "input_tokens": used["prompt_tokens"],
                "output_tokens": used["completion_tokens"],
                "total_tokens": used["total_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens_details": used["completion_tokens_details"],
            }
            answer["nanohybrid"] = self.chat.extra()
        return answer


def _text(kind: str) -> str:
    return "reasoning_text" if kind == "reasoning" else "output_text"
