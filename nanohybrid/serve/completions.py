"""`/v1/completions`: texts in, their continuations out."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from nanohybrid.engine import Completion
from nanohybrid.serve.chat import extra, usage
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.loop import Update
from nanohybrid.serve.schemas import CompletionRequest
from nanohybrid.serve.service import Generation, Service
from nanohybrid.serve.wire import DONE, EventStream, data, unless_gone


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Answer it."""
    check(service, body)
    texts = prompts_of(body.prompt)
    count = body.n * len(texts)
    service.limits.count(count, "max_n", "prompt", "prompts times n")
    service.loop.take_places(count)
    try:
        prompts = await service.prepare(lambda: [_ids(service, text) for text in texts])
        for prompt in prompts:
            service.too_long(prompt)
        longest = max(prompts, key=len)
        params = service.params(body, longest, body.max_tokens, body.budget, service.llm.opens_thinking(prompts[0]))
        params = replace(params, logprobs=body.logprobs is not None, top_logprobs=body.logprobs or 0)
    except BaseException:
        service.loop.give_places(count)
        raise
    salt = service.salt(request.scope, body.cache_salt)
    generation = service.generate(prompts, params, body.n, body.stream, salt=salt)
    work = Completing(service, body, generation, sum(map(len, prompts)))
    if body.stream:
        return EventStream(work.events(), work.generation.close, service.limits.request_seconds)
    try:
        return JSONResponse(await unless_gone(request, work.whole(), service.limits.request_seconds))
    finally:
        work.generation.close()


class Completing:
    """One request that is being answered."""

    def __init__(self, service: Service, body: CompletionRequest, generation: Generation, prompt_tokens: int) -> None:
        self.service, self.body, self.generation, self.prompt_tokens = service, body, generation, prompt_tokens
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": service.settings.name,
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        results = await self.generation.all()
        completions = [completion for _, completion in results]
        choices = [
            self._choice(index, completion.text, completion.finish_reason, update, 0) for index, (update, completion) in enumerate(results)
        ]
        return {**self.head, "choices": choices, "usage": usage(self.prompt_tokens, completions), "nanohybrid": extra(completions)}

    async def events(self) -> AsyncIterator[bytes]:
        ended: dict[int, Completion] = {}
        offsets = dict.fromkeys(range(len(self.generation.tickets)), 0)
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        async for index, update in self.generation.each():
            reason = None
            if update.completion is not None:
                ended[index], reason = update.completion, update.completion.finish_reason
            chunk: dict[str, Any] = {**self.head, "choices": [self._choice(index, update.text, reason, update, offsets[index])]}
            offsets[index] += len(update.text)
            if len(ended) == len(offsets) and not with_usage:
                chunk["nanohybrid"] = extra([ended[one] for one in sorted(ended)])
            yield data(chunk)
        if with_usage:
            completions = [ended[one] for one in sorted(ended)]
            yield data({**self.head, "choices": [], "usage": usage(self.prompt_tokens, completions), "nanohybrid": extra(completions)})
        yield DONE

    def _choice(self, index: int, text: str, reason: str | None, update: Update, offset: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        if self.body.logprobs is not None and update.tokens:
            names = [self._name(token) for token in update.tokens]
            offsets = [offset + sum(map(len, names[:at])) for at in range(len(names))]
            given = update.top or [[] for _ in names]
            tops = [
                {self._name(token): value for token, value in top} | {name: chosen}  # as OpenAI: the one that was taken, too
                for top, name, chosen in zip(given, names, update.logprobs, strict=True)
            ]
            choice["logprobs"] = {"tokens": names, "token_logprobs": update.logprobs, "top_logprobs": tops, "text_offset": offsets}
        return choice

    def _name(self, token: int) -> str:
        return self.service.llm.tokenizer.decode([token], marks=True)


def check(service: Service, body: CompletionRequest) -> None:
    """Refuse what is too large, and what this engine cannot do."""
    service.check_decoding(body)
    service.limits.count(body.logprobs or 0, "max_logprobs", "logprobs", "alternatives")
    if body.echo:
        raise ApiError(400, "echo is not supported by this engine yet", "echo")
    if body.suffix:
        raise ApiError(400, "suffix is not supported: the model writes forward only", "suffix")
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(400, "best_of is not supported; leave it out, or give n", "best_of")


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, each a text or ids."""
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
