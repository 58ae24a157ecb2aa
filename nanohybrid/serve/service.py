"""What every route stands on: the model, the loop, the limits, and how a request becomes a prompt and parameters."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanohybrid.engine import LLM, Completion, Engine, SamplingParams
from nanohybrid.engine.step import out_of_memory
from nanohybrid.engine.structured_output import Grammar
from nanohybrid.errors import InputError, NanohybridError, shown
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.limits import Limits
from nanohybrid.serve.loop import EngineLoop, Places
from nanohybrid.serve.metrics import Metrics
from nanohybrid.serve.schemas import Decoding, Message, Tool
from nanohybrid.serve.stream import Ticket, Update

MAX_MODEL_LEN = 8192  # tokens of a request, prompt and answer, where nothing says
THINKING = {"temperature": 0.6, "top_p": 0.95}  # the model card's, where a request leaves them open
PLAIN = {"temperature": 0.0, "top_p": 1.0}
EFFORTS = {
    "minimal": 128,
    "low": 512,
    "medium": 2048,
    "high": 8192,
    "xhigh": None,
}  # "none" switches thinking off
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What a server is told once, beside the engine's configuration (`LLM.engine_config`).

    model_name: what clients call the model. max_queue: requests that may wait for a slot; the next gets 429. thinking_budget and
    thinking_grace: in tokens, where a request gives none. api_keys: a request needs one of them; without any, no key is needed.
    max_requests_per_key: how many requests of one key may run and wait at once; None: no limit.
    """

    model_name: str = "nanohybrid"
    max_queue: int = 128
    thinking_budget: int | None = None
    thinking_grace: int = 500
    api_keys: tuple[str, ...] = ()
    max_requests_per_key: int | None = None


class Service:
    """Made once. Raises InputError where the engine's memory cannot be had, or where the model cannot generate."""

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        limits: Limits | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.llm, self.settings, self.limits = llm, settings, limits or Limits()
        longest = llm.engine_config.max_model_len or MAX_MODEL_LEN
        config = replace(
            llm.engine_config,
            max_model_len=min(longest, llm.model.config.max_position_embeddings),
            step_timeout=self.limits.step_seconds,
        )
        engine = Engine(llm.model, llm.tokenizer, config)
        prompt = llm.encode_chat([{"role": "user", "content": "hi"}])  # finds a template that cannot be used
        try_out(engine, prompt)
        self.loop = EngineLoop(
            engine,
            settings.max_queue,
            self.limits.queue_seconds,
            on_death,
            settings.max_requests_per_key,
            prompt,
        )
        self.metrics = Metrics(self.loop)
        self.began = int(time.time())
        self._workers = ThreadPoolExecutor(2, "prepare")

    @property
    def context(self) -> int:
        return self.loop.engine.scheduler.max_model_len

    # Requests to prompts

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Run template and tokenizer beside the event loop, under a deadline."""
        future = asyncio.get_running_loop().run_in_executor(self._workers, without_panic, work)
        try:
            return await asyncio.wait_for(future, self.limits.prepare_seconds)
        except TimeoutError:
            raise ApiError(
                400, f"template and tokenizer took longer than {self.limits.prepare_seconds:g} seconds"
            ) from None
        except NanohybridError as error:
            raise ApiError(400, str(error)) from None

    def conversation(
        self, messages: list[Message], tools: list[Tool] | None, thinking: bool | None
    ) -> list[int]:
        """Ids of a conversation, up to where the answer begins."""
        schemas = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        return self.llm.template.encode(
            self.llm.tokenizer, [message.plain() for message in messages], schemas, thinking
        )

    def junctions(
        self, messages: list[Message], tools: list[Tool] | None, thinking: bool | None, prompt: list[int]
    ) -> list[int]:
        """Where other prompts will part from this one: after system and tools, and before the `<think>` of the answer, which the
        next turn does not show. Found by what the tokens have in common, not by looking for special tokens."""
        if self.loop.engine.prefix_cache is None:
            return []
        system = [message for message in messages[:1] if message.role in ("system", "developer")]
        other = self.conversation([*system, Message(role="user", content="\x01")], tools, thinking)
        schemas = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        next_turn = [message.plain() for message in messages] + [{"role": "assistant", "content": "\x01"}]
        later = self.llm.template.encode(self.llm.tokenizer, next_turn, schemas, thinking, generate=False)
        return sorted({common for ids in (other, later) if 0 < (common := shared(prompt, ids)) < len(prompt)})

    @staticmethod
    def key(scope: Mapping[str, Any]) -> str:
        """A name for the key that a request came with; empty where none is wanted."""
        return scope.get("nanohybrid.key") or ""

    def salt(self, scope: Mapping[str, Any], asked: str | None) -> str:
        """Whose prompts may share what was computed: with several keys, each key's own; divided further where a request asks."""
        key = self.key(scope) if len(self.settings.api_keys) > 1 else ""
        return f"{key}/{asked or ''}"

    def too_long(self, prompt: list[int]) -> None:
        if len(prompt) >= self.context:
            message = (
                f"the prompt has {len(prompt):,} tokens; the context holds {self.context:,} with the answer"
            )
            raise ApiError(400, message, "messages", "context_length_exceeded")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"there is no model {name!r} here; this is {self.settings.model_name!r}",
                "model",
                "model_not_found",
            )

    def check_decoding(self, body: Decoding) -> None:
        """Sizes that every generating route shares."""
        self.check_model(body.model)
        self.limits.count(body.n, "max_n", "n", "choices")
        self.limits.count(len(body.stops), "max_stops", "stop", "strings")
        for stop in body.stops:
            if not stop:
                raise ApiError(400, "stop: a stop string must not be empty", "stop")
            self.limits.count(
                len(stop.encode("utf-8", "replace")), "max_stop_bytes", "stop", "bytes in one string"
            )
        self.limits.count(len(body.logit_bias or ()), "max_logit_bias", "logit_bias", "entries")

    def params(
        self, body: Decoding, prompt: list[int], most: int | None, budget: int | None, thinks: bool
    ) -> SamplingParams:
        """The parameters of the first choice."""
        left = self.context - len(prompt)
        if most is not None and most > left:
            size = f"max_tokens is {most:,} and the prompt has {len(prompt):,} tokens"
            raise ApiError(
                400,
                f"{size}: more than the context of {self.context:,}",
                "max_tokens",
                "context_length_exceeded",
            )
        free = THINKING if thinks else PLAIN
        fields: dict[str, Any] = {
            "max_tokens": left if most is None else most,
            "temperature": free["temperature"] if body.temperature is None else body.temperature,
            "top_p": free["top_p"] if body.top_p is None else body.top_p,
            "top_k": max(body.top_k, 0),
            "min_p": body.min_p,
            "seed": body.seed,
            "stop": body.stops,
            "ignore_eos": body.ignore_eos,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty,
            "logit_bias": self._bias(body.logit_bias or {}),
            "thinking_budget": self.settings.thinking_budget if budget is None else budget,
            "thinking_grace": self.settings.thinking_grace
            if body.thinking_grace is None
            else body.thinking_grace,
        }
        return SamplingParams(**fields)

    def _bias(self, bias: dict[str, float]) -> dict[int, float]:
        size = self.llm.model.config.vocab_size
        for token in bias:
            if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < size):
                raise ApiError(400, f"logit_bias: {token[:40]!r} is not the id of a token", "logit_bias")
        return {int(token): value for token, value in bias.items()}

    async def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """The compiled grammar of the structured outputs, made beside the event loop and the engine, under a deadline."""
        if params.structured_outputs is None:
            return None
        return await self.prepare(lambda: self.loop.engine.compile_grammar(params))

    # Generations

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        n: int,
        live: bool,
        places: Places,
        grammar: Grammar | None = None,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
    ) -> "Generation":
        """Submit `n` choices of each prompt, for which `places` are held; `grammar` constrains every one of them."""
        params = replace(params, n=n)
        tickets: list[Ticket] = []
        for prompt in prompts:
            tickets += self.loop.submit(prompt, params, live, grammar, cache_breakpoints, salt)
        return Generation(self, tickets, places)

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)


class Generation:
    """The tickets of one request. `close` frees what they hold, however it ended."""

    def __init__(self, service: Service, tickets: list[Ticket], places: Places) -> None:
        self.service, self.tickets, self.places = service, tickets, places
        self._closed = False

    async def all(self) -> list[tuple[Update, Completion]]:
        """Everything of every choice, once all have ended."""
        results = []
        for ticket in self.tickets:
            async for update in ticket.updates():
                if update.completion is not None:
                    results.append((update, self.finished(ticket, update.completion)))
        return results

    async def each(self) -> AsyncIterator[tuple[int, Update]]:
        """What each choice says, as it comes."""
        if len(self.tickets) == 1:
            async for update in self.tickets[0].updates():
                if update.completion is not None:
                    self.finished(self.tickets[0], update.completion)
                yield 0, update
            return
        queue: asyncio.Queue[tuple[int, Update | Exception]] = asyncio.Queue()

        async def pump(index: int, ticket: Ticket) -> None:
            try:
                async for update in ticket.updates():
                    queue.put_nowait((index, update))
            except ApiError as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(pump(index, ticket)) for index, ticket in enumerate(self.tickets)]
        try:
            left = len(tasks)
            while left:
                index, news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                if news.completion is not None:
                    left -= 1
                    self.finished(self.tickets[index], news.completion)
                yield index, news
        finally:
            for task in tasks:
                task.cancel()

    def finished(self, ticket: Ticket, completion: Completion) -> Completion:
        """Count it; raises ApiError where it failed."""
        self.service.metrics.finished(ticket, completion)
        self.service.loop.last_seconds = ticket.last - ticket.arrived
        if completion.error is not None:
            status = 400 if completion.error.code == "grammar_too_complex" else 500
            raise ApiError(status, completion.error.message, code=completion.error.code)
        return completion

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for ticket in self.tickets:
                if not ticket.over:
                    self.service.metrics.cancelled()
                    self.service.loop.cancel(ticket)
            self.places.give()


def without_panic(work: Callable[[], Result]) -> Result:
    """The result of `work`. A panic of a library in Rust, which is no Exception, becomes an InputError: a text caused it."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as panic:
        raise InputError(
            f"this text cannot be prepared ({type(panic).__name__}: {shown(str(panic))})"
        ) from panic


def try_out(engine: Engine, prompt: Sequence[int]) -> None:
    """Generate two tokens before the server is ready: what a configuration breaks is found here and by no client.

    Raises NanohybridError in one line.
    """
    try:
        engine.check(prompt)
    except (NanohybridError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"this model cannot generate ({type(error).__name__}: {reason})") from error


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two prompts have in common at their beginning."""
    return next(
        (index for index, (left, right) in enumerate(zip(a, b, strict=False)) if left != right),
        min(len(a), len(b)),
    )


def model_name(path: Path | None, preset: str | None) -> str:
    """What clients call the model: the directory's name."""
    return path.resolve().name if path is not None else f"{preset}-random"
