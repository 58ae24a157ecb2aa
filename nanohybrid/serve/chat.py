"""`/v1/chat/completions`: a conversation in, an answer out, whole or as a stream of events."""

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
from nanohybrid.serve.output_parser import OutputDelta, OutputParser, ReasoningDelta
from nanohybrid.serve.schemas import ChatRequest, NamedTool
from nanohybrid.serve.service import EFFORTS, Generation, Service
from nanohybrid.serve.sse import DONE, EventStream, run_until_disconnect, sse_event
from nanohybrid.serve.stream import Delta
from nanohybrid.serve.structured_output import check_structured_outputs, structured_outputs
from nanohybrid.serve.tools import TextDelta, ToolCallArguments, ToolCallStart
from nanohybrid.text.tool_format import NEMOTRON

MIN_LOGPROB = -9999.0  # what is shown for a token that a grammar excludes: JSON has no infinity


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer a request. Raises ApiError before the first byte of a stream where the request is refused."""
    answer = await ChatAnswer.begin(service, body, request.scope)
    if body.stream:
        return EventStream(answer.events(), answer.generation.close, service.limits.request_seconds)
    try:
        return JSONResponse(
            await run_until_disconnect(request, answer.response(), service.limits.request_seconds)
        )
    finally:
        answer.generation.close()


class ChatAnswer:
    """The answer to one request, while it is written."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation, thinks: bool) -> None:
        self.service, self.body, self.generation = service, body, generation
        self.prompt_tokens = len(generation.streams[0].prompt)
        offered = () if body.tool_choice == "none" else body.tools or ()
        tools = {tool.function.name: tool.function.parameters or {} for tool in offered}
        params = generation.streams[0].params
        format = service.tool_format if tools else NEMOTRON
        self.parsers = [
            OutputParser(
                thinks,
                tools,
                params.thinking_budget is not None,
                1 if body.parallel_tool_calls is False else float("inf"),
                may_think=params.may_think,
                tool_format=format,
            )
            for _ in generation.streams
        ]
        self.completions: dict[int, Completion] = {}
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    @classmethod
    async def begin(cls, service: Service, body: ChatRequest, scope: Mapping[str, Any]) -> "ChatAnswer":
        """Check, prepare and submit a request. Raises ApiError where it is refused."""
        check(service, body)
        permits = service.loop.admit(body.n, service.key(scope))
        try:
            tools = None if body.tool_choice == "none" else body.tools
            thinking, budget = thinking_of(body)
            prompt = await service.run_in_worker(
                lambda: service.encode_conversation(body.messages, tools, thinking)
            )
            service.check_prompt_length(prompt)
            thinks, may_think = service.llm.opens_thinking(prompt), service.llm.may_think(prompt)
            params = service.params(body, prompt, body.max_answer_tokens, budget, thinks or may_think)
            params = replace(
                params,
                may_think=may_think,
                logprobs=body.logprobs,
                top_logprobs=body.top_logprobs or 0,
                structured_outputs=structured_outputs(body, service.tool_format if tools else NEMOTRON),
            )
            breakpoints = await service.run_in_worker(
                lambda: service.cache_breakpoints(body.messages, tools, thinking, prompt)
            )
            grammar = await service.compile_grammar(params)
        except BaseException:
            permits.release()
            raise
        salt = service.salt(scope, body.cache_salt)
        generation = service.generate(
            [prompt], params, body.n, body.stream, permits, grammar, breakpoints, salt
        )
        return cls(service, body, generation, thinks)

    async def response(self) -> dict[str, Any]:
        """The whole answer as one object."""
        choices = []
        for index, (delta, completion) in enumerate(await self.generation.all()):
            parser = self.parsers[index]
            message = _message([*parser.push(completion.text), *parser.end()])
            choice = {"index": index, "message": message, "finish_reason": _reason(completion, parser)}
            choice["logprobs"] = self._logprobs(delta) if self.body.logprobs else None
            choices.append(choice)
            self.completions[index] = completion
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.usage(),
            "nanohybrid": self.extra(),
        }

    async def outputs(self) -> AsyncIterator[tuple[int, Delta, list[OutputDelta]]]:
        """Yield (index, delta, parsed delta) of all completions as they are written."""
        async for index, delta in self.generation.each():
            outputs = self.parsers[index].push(delta.text)
            if delta.completion is not None:
                outputs += self.parsers[index].end()
                self.completions[index] = delta.completion
            yield index, delta, outputs

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        head = {**self.head, "object": "chat.completion.chunk"}
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        for index in range(self.body.n):
            yield sse_event({**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]})
        async for index, delta, outputs in self.outputs():
            logprobs = self._logprobs(delta) if self.body.logprobs and delta.tokens else None
            for fields in [_delta(output) for output in outputs] or ([{}] if logprobs else []):
                yield sse_event({**head, "choices": [_choice(index, fields, logprobs=logprobs)]})
                logprobs = None
            if delta.completion is not None:
                last = {
                    **head,
                    "choices": [_choice(index, {}, _reason(delta.completion, self.parsers[index]))],
                }
                ended = len(self.completions) == self.body.n
                yield sse_event(last | ({"nanohybrid": self.extra()} if ended and not with_usage else {}))
        if with_usage:
            yield sse_event({**head, "choices": [], "usage": self.usage(), "nanohybrid": self.extra()})
        yield DONE

    def usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, list(self.completions.values()))

    def extra(self) -> dict[str, Any]:
        return extra([self.completions[index] for index in sorted(self.completions)])

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        tops = delta.top or [[] for _ in delta.tokens]
        entries = []
        for token, logprob, top in zip(delta.tokens, delta.logprobs, tops, strict=True):
            entries.append(
                self._entry(token, logprob) | {"top_logprobs": [self._entry(*pair) for pair in top]}
            )
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.service.llm.tokenizer.token_bytes(token, skip_special_tokens=False)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(raw),
        }


def check(service: Service, body: ChatRequest) -> None:
    """Raise ApiError 400, with the field's name, for what is too large or contradicts itself."""
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
    """Whether to think (None: as the messages say), and the budget in tokens (None: as the server says)."""
    wanted = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    effort = body.reasoning_effort
    if wanted is None and effort is not None:
        wanted = effort != "none"
    budget = body.budget
    return wanted, EFFORTS.get(effort) if budget is None and effort is not None else budget


def usage(prompt_tokens: int, completions: list[Completion]) -> dict[str, Any]:
    """OpenAI's `usage`: the tokens of the prompt, counted once, and of all completions."""
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
    """The field `nanohybrid`: how thinking ended, and why no token of the prompt was cached."""
    ends = [completion.thinking_end for completion in completions]
    miss = completions[0].cache_miss if completions else None
    return {"thinking_end": ends[0] if ends else "none", "cache_miss": miss} | (
        {"thinking_ends": ends} if len(ends) > 1 else {}
    )


def _reason(completion: Completion, parser: OutputParser) -> str:
    return "tool_calls" if parser.calls and completion.finish_reason == "stop" else completion.finish_reason


def _choice(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(output: OutputDelta) -> dict[str, Any]:
    match output:
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case TextDelta(text):
            return {"content": text}
        case ToolCallStart(index, name):
            call = {
                "index": index,
                "id": new_call_id(),
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
            return {"tool_calls": [call]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(outputs: list[OutputDelta]) -> dict[str, Any]:
    reasoning = "".join(output.text for output in outputs if isinstance(output, ReasoningDelta))
    content = "".join(output.text for output in outputs if isinstance(output, TextDelta))
    calls = calls_of(outputs)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
    }
    message["reasoning_content"] = reasoning or None
    if calls:
        message["tool_calls"] = [
            {"id": new_call_id(), "type": "function", "function": call} for call in calls
        ]
    return message


def calls_of(outputs: list[OutputDelta]) -> list[dict[str, str]]:
    """The name and arguments of each tool call."""
    calls: list[dict[str, str]] = []
    for output in outputs:
        if isinstance(output, ToolCallStart):
            calls.append({"name": output.name, "arguments": ""})
        elif isinstance(output, ToolCallArguments):
            calls[output.call]["arguments"] += output.text
    for call in calls:
        if not call["arguments"]:
            call["arguments"] = json.dumps({})
    return calls


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
