"""`/v1/chat/completions`: a conversation in, an answer out, whole or as it is written."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from nanohybrid.engine import Completion
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.output_parser import Answer, Part, Thought
from nanohybrid.serve.schemas import ChatRequest, NamedTool
from nanohybrid.serve.service import EFFORTS, Generation, Service
from nanohybrid.serve.sse import DONE, EventStream, data, unless_gone
from nanohybrid.serve.stream import Update
from nanohybrid.serve.structured_output import check_structured_outputs, structured_outputs
from nanohybrid.serve.tools import Arguments, CallBegins, Text

LEAST = -9999.0  # the log-probability that is shown of what a grammar rules out: JSON has no infinity


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer it. Everything that can be refused is refused before the first byte of a stream."""
    talk = await Chat.begin(service, body, request.scope)
    if body.stream:
        return EventStream(talk.events(), talk.generation.close, service.limits.request_seconds)
    try:
        return JSONResponse(await unless_gone(request, talk.whole(), service.limits.request_seconds))
    finally:
        talk.generation.close()


class Chat:
    """One request that is being answered."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation, thinks: bool) -> None:
        self.service, self.body, self.generation = service, body, generation
        self.prompt_tokens = len(generation.tickets[0].prompt)
        offered = () if body.tool_choice == "none" else body.tools or ()
        names = frozenset(tool.function.name for tool in offered)
        budgeted = generation.tickets[0].params.thinking_budget is not None
        most_calls = 1 if body.parallel_tool_calls is False else float("inf")
        self.answers = [Answer(thinks, names, budgeted, most_calls) for _ in generation.tickets]
        self.completions: dict[int, Completion] = {}
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    @classmethod
    async def begin(cls, service: Service, body: ChatRequest, scope: Mapping[str, Any]) -> "Chat":
        check(service, body)
        held = service.loop.take_places(body.n, service.key(scope))
        try:
            tools = None if body.tool_choice == "none" else body.tools
            thinking, budget = thinking_of(body)
            prompt = await service.prepare(lambda: service.conversation(body.messages, tools, thinking))
            service.too_long(prompt)
            thinks = service.llm.opens_thinking(prompt)
            params = service.params(body, prompt, body.most, budget, thinks)
            params = replace(
                params,
                logprobs=body.logprobs,
                top_logprobs=body.top_logprobs or 0,
                structured_outputs=structured_outputs(body),
            )
            places = await service.prepare(lambda: service.junctions(body.messages, tools, thinking, prompt))
            grammar = await service.compile_grammar(params)
        except BaseException:
            held.give()
            raise
        salt = service.salt(scope, body.cache_salt)
        return cls(
            service,
            body,
            service.generate([prompt], params, body.n, body.stream, held, grammar, places, salt),
            thinks,
        )

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = []
        for index, (update, completion) in enumerate(await self.generation.all()):
            answer = self.answers[index]
            message = _message([*answer.push(completion.text), *answer.end()])
            choice = {"index": index, "message": message, "finish_reason": _reason(completion, answer)}
            choice["logprobs"] = self._logprobs(update) if self.body.logprobs else None
            choices.append(choice)
            self.completions[index] = completion
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.usage(),
            "nanohybrid": self.extra(),
        }

    async def parts(self) -> AsyncIterator[tuple[int, Update, list[Part]]]:
        """What each choice says, parted."""
        async for index, update in self.generation.each():
            parts = self.answers[index].push(update.text)
            if update.completion is not None:
                parts += self.answers[index].end()
                self.completions[index] = update.completion
            yield index, update, parts

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        head = {**self.head, "object": "chat.completion.chunk"}
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        for index in range(self.body.n):
            yield data({**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]})
        async for index, update, parts in self.parts():
            logprobs = self._logprobs(update) if self.body.logprobs and update.tokens else None
            for delta in [_delta(part) for part in parts] or ([{}] if logprobs else []):
                yield data({**head, "choices": [_choice(index, delta, logprobs=logprobs)]})
                logprobs = None
            if update.completion is not None:
                last = {
                    **head,
                    "choices": [_choice(index, {}, _reason(update.completion, self.answers[index]))],
                }
                ended = len(self.completions) == self.body.n
                yield data(last | ({"nanohybrid": self.extra()} if ended and not with_usage else {}))
        if with_usage:
            yield data({**head, "choices": [], "usage": self.usage(), "nanohybrid": self.extra()})
        yield DONE

    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, list(self.completions.values()))

    def extra(self) -> dict[str, Any]:
        return extra([self.completions[index] for index in sorted(self.completions)])

    def _logprobs(self, update: Update) -> dict[str, Any]:
        tops = update.top or [[] for _ in update.tokens]
        entries = []
        for token, logprob, top in zip(update.tokens, update.logprobs, tops, strict=True):
            entries.append(
                self._entry(token, logprob) | {"top_logprobs": [self._entry(*pair) for pair in top]}
            )
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.service.llm.tokenizer.token_bytes(token, skip_special_tokens=False)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


def check(service: Service, body: ChatRequest) -> None:
    """Refuse what is too large or contradicts itself, naming the field."""
    limits = service.limits
    service.check_decoding(body)
    limits.count(len(body.messages), "max_messages", "messages", "messages")
    limits.count(len(body.tools or ()), "max_tools", "tools", "tools")
    for index, tool in enumerate(body.tools or ()):
        limits.schema(tool.function.parameters, f"tools[{index}].function.parameters")
    limits.count(body.top_logprobs or 0, "max_logprobs", "top_logprobs", "alternatives")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    choice = body.tool_choice
    if isinstance(choice, NamedTool) and choice.function.name not in {
        tool.function.name for tool in body.tools or ()
    }:
        raise ApiError(
            400, f"tool_choice names {choice.function.name!r}, which is not among tools", "tool_choice"
        )
    if choice == "required" and not body.tools:
        raise ApiError(400, "tool_choice is required and there are no tools", "tool_choice")
    check_structured_outputs(body, limits)


def thinking_of(body: ChatRequest) -> tuple[bool | None, int | None]:
    """Whether to think (None: as the messages say) and how long (None: as the server says)."""
    wanted = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    effort = body.reasoning_effort
    if wanted is None and effort is not None:
        wanted = effort != "none"
    budget = body.budget
    return wanted, EFFORTS.get(effort) if budget is None and effort is not None else budget


def usage(prompt_tokens: int, completions: list[Completion]) -> dict[str, Any]:
    """Tokens, of the prompt once and of all choices."""
    written = sum(len(completion.token_ids) for completion in completions)
    cached = max((completion.cached_tokens for completion in completions), default=0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(completion.thinking_tokens for completion in completions)
        },
    }


def extra(completions: list[Completion]) -> dict[str, Any]:
    """What is ours: how thinking ended, and why nothing of the prompt was cached."""
    ends = [completion.thinking_end for completion in completions]
    miss = completions[0].cache_miss if completions else None
    return {"thinking_end": ends[0] if ends else "none", "cache_miss": miss} | (
        {"thinking_ends": ends} if len(ends) > 1 else {}
    )


def _reason(completion: Completion, answer: Answer) -> str:
    return "tool_calls" if answer.calls and completion.finish_reason == "stop" else completion.finish_reason


def _choice(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Thought(text):
            return {"reasoning_content": text}
        case Text(text):
            return {"content": text}
        case CallBegins(index, name):
            call = {
                "index": index,
                "id": new_call_id(),
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
            return {"tool_calls": [call]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(parts: list[Part]) -> dict[str, Any]:
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    said = "".join(part.text for part in parts if isinstance(part, Text))
    calls = calls_of(parts)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": said if said or not calls else None,
        "refusal": None,
    }
    message["reasoning_content"] = thought or None
    if calls:
        message["tool_calls"] = [
            {"id": new_call_id(), "type": "function", "function": call} for call in calls
        ]
    return message


def calls_of(parts: list[Part]) -> list[dict[str, str]]:
    """Name and arguments of each call."""
    calls: list[dict[str, str]] = []
    for part in parts:
        if isinstance(part, CallBegins):
            calls.append({"name": part.name, "arguments": ""})
        elif isinstance(part, Arguments):
            calls[part.call]["arguments"] += part.text
    for call in calls:
        if not call["arguments"]:
            call["arguments"] = json.dumps({})
    return calls


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
