"""`/v1/completions`: prompts in, their continuations out."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import Request
from starlette.responses import JSONResponse, Response

from nanohybrid.engine import Completion
from nanohybrid.engine.params import Top
from nanohybrid.serve.chat import MIN_LOGPROB, extra, usage
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.schemas import CompletionRequest
from nanohybrid.serve.service import Generation, Service
from nanohybrid.serve.sse import DONE, EventStream, run_until_disconnect, sse_event
from nanohybrid.serve.stream import Delta
from nanohybrid.serve.structured_output import check_structured_outputs, structured_outputs


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Answer a request. Raises ApiError before the first byte of a stream where the request is refused."""
    check(service, body)
    texts = prompts_of(body.prompt)
    count = body.n * len(texts)
    service.limits.count(count, "max_prompts", "prompt", "prompts times n")
    if count > service.loop.capacity:
        raise ApiError(
            400,
            f"prompt: {count} prompts times n are more than run and wait here ({service.loop.capacity})",
            "prompt",
        )
    permits = service.loop.admit(count, service.key(request.scope))
    try:
        prompts = await service.run_in_worker(lambda: [_ids(service, text) for text in texts])
        for prompt in prompts:
            service.check_prompt_length(prompt)
        longest = max(prompts, key=len)
        most = None if body.max_tokens is None else max(body.max_tokens, 1)
        params = service.params(body, longest, most, body.budget, service.llm.opens_thinking(prompts[0]))
        scored = body.logprobs if body.echo else None
        params = replace(
            params,
            logprobs=body.logprobs is not None,
            top_logprobs=body.logprobs or 0,
            prompt_logprobs=scored,
            structured_outputs=structured_outputs(body),
        )
        grammar = await service.compile_grammar(params)
    except BaseException:
        permits.release()
        raise
    salt = service.salt(request.scope, body.cache_salt)
    generation = service.generate(prompts, params, body.n, body.stream, permits, grammar, salt=salt)
    echoed = (
        [
            text if isinstance(text, str) else service.llm.tokenizer.decode(text, skip_special_tokens=False)
            for text in texts
        ]
        if body.echo
        else []
    )
    answer = CompletionAnswer(service, body, generation, sum(map(len, prompts)), echoed)
    if body.stream:
        return EventStream(answer.events(), answer.generation.close, service.limits.request_seconds)
    try:
        return JSONResponse(
            await run_until_disconnect(request, answer.response(), service.limits.request_seconds)
        )
    finally:
        answer.generation.close()


class CompletionAnswer:
    """The answer to one request, while it is written. echoed: texts of prompts that it contains."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        generation: Generation,
        prompt_tokens: int,
        echoed: Sequence[str] = (),
    ) -> None:
        self.service, self.body, self.generation, self.prompt_tokens = (
            service,
            body,
            generation,
            prompt_tokens,
        )
        self.echoed = echoed
        self._offsets: dict[int, int] = {}  # of each choice, how many characters of token names were sent
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    async def response(self) -> dict[str, Any]:
        results = await self.generation.all()
        completions = [completion for _, completion in results]
        choices = [
            self._choice(index, completion.text, completion.finish_reason, delta)
            for index, (delta, completion) in enumerate(results)
        ]
        return {
            **self.head,
            "choices": choices,
            "usage": self._usage(completions),
            "nanohybrid": extra(completions),
        }

    async def events(self) -> AsyncIterator[bytes]:
        ended: dict[int, Completion] = {}
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        async for index, delta in self.generation.each():
            reason = None
            if delta.completion is not None:
                ended[index], reason = delta.completion, delta.completion.finish_reason
            chunk: dict[str, Any] = {
                **self.head,
                "choices": [self._choice(index, delta.text, reason, delta)],
            }
            if len(ended) == len(self.generation.streams) and not with_usage:
                chunk["nanohybrid"] = extra([ended[one] for one in sorted(ended)])
            yield sse_event(chunk)
        if with_usage:
            completions = [ended[one] for one in sorted(ended)]
            yield sse_event(
                {
                    **self.head,
                    "choices": [],
                    "usage": self._usage(completions),
                    "nanohybrid": extra(completions),
                }
            )
        yield DONE

    def _usage(self, completions: list[Completion]) -> dict[str, Any]:
        counted = usage(self.prompt_tokens, completions)
        if self.body.max_tokens == 0:  # one token was computed, which is not returned
            counted |= {"completion_tokens": 0, "total_tokens": self.prompt_tokens}
        return counted

    def _choice(self, index: int, text: str, reason: str | None, delta: Delta) -> dict[str, Any]:
        begins = index not in self._offsets
        prompt = self.generation.streams[index].prompt if begins and self.echoed else []
        shown = not (self.body.echo and self.body.max_tokens == 0)
        text = (self.echoed[index // self.body.n] if begins and self.echoed else "") + (text if shown else "")
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        self._offsets.setdefault(index, 0)
        if self.body.logprobs is not None and (delta.tokens or prompt):
            of_prompt = (
                Scored(prompt, [None, *delta.prompt_logprobs], [[], *delta.prompt_top])
                if prompt
                else Scored([], [], [])
            )
            written = Scored(delta.tokens, [*delta.logprobs], delta.top) if shown else Scored([], [], [])
            choice["logprobs"] = self._logprobs(index, [of_prompt, written])
        return choice

    def _logprobs(self, index: int, parts: "list[Scored]") -> dict[str, Any]:
        """OpenAI's older format: parallel lists, with the written token always among the alternatives."""
        names: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for part in parts:
            given = part.top or [[] for _ in part.tokens]
            for token, value, top in zip(part.tokens, part.logprobs, given, strict=True):
                name = self._name(token)
                names.append(name)
                values.append(None if value is None else max(value, MIN_LOGPROB))
                shown = {self._name(other): max(logprob, MIN_LOGPROB) for other, logprob in top}
                tops.append(None if value is None else shown | {name: max(value, MIN_LOGPROB)})
                offsets.append(self._offsets[index])
                self._offsets[index] += len(name)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        """The text of a token, or its bytes where they are no whole character: no two names are equal."""
        raw = self.service.llm.tokenizer.token_bytes(token, skip_special_tokens=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Scored(NamedTuple):
    """Tokens, their log-probabilities (None for the first token of a prompt), and the alternatives."""

    tokens: list[int]
    logprobs: list[float | None]
    top: Top


def check(service: Service, body: CompletionRequest) -> None:
    """Raise ApiError 400, with the field's name, for what is too large or not supported."""
    service.check_decoding(body)
    service.limits.count(body.logprobs or 0, "max_logprobs", "logprobs", "alternatives")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which is only allowed with echo", "max_tokens")
    check_structured_outputs(body, service.limits)
    if body.suffix:
        raise ApiError(400, "suffix is not supported: the model writes forward only", "suffix")
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(400, "best_of is not supported; leave it out, or give n", "best_of")


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts, each a text or ids. Raises ApiError 400 for an empty list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is an empty list", "prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def _ids(service: Service, prompt: str | list[int]) -> list[int]:
    size = service.llm.model.config.vocab_size
    if isinstance(prompt, str):
        return service.llm.encode(prompt) or [service.llm.tokenizer.bos_id]
    if not prompt or not all(0 <= token < size for token in prompt):
        raise ApiError(400, f"prompt: ids must be from 0 to {size - 1}, at least one", "prompt")
    return prompt
