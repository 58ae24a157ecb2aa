"""What all routes use: model, engine loop and limits, and how a request becomes ids and parameters."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanohybrid.checkpoint import display_name
from nanohybrid.engine import LLM, Engine, SamplingParams
from nanohybrid.engine.step import out_of_memory
from nanohybrid.engine.structured_output import Grammar
from nanohybrid.errors import InputError, NanohybridError, shown
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.generation import Generation
from nanohybrid.serve.limits import Limits
from nanohybrid.serve.loop import AdmissionPermits, EngineLoop
from nanohybrid.serve.metrics import Metrics
from nanohybrid.serve.schemas import Decoding, Message, Tool
from nanohybrid.serve.stream import RequestStream
from nanohybrid.text.tool_format import ToolFormat

MAX_MODEL_LEN = 8192  # tokens of a request, prompt and answer, where the engine's configuration has no number
# Sampling where a request does not say: that of NVIDIA's model card with thinking, greedy without.
THINKING = {"temperature": 0.6, "top_p": 0.95}
NOT_THINKING = {"temperature": 0.0, "top_p": 1.0}
# Thinking budgets of `reasoning_effort`, in tokens; "none" turns thinking off.
EFFORTS = {"minimal": 128, "low": 512, "medium": 2048, "high": 8192, "xhigh": None}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """The settings of a server, beside the engine's configuration (`LLM.engine_config`).

    model_name: what clients call the model. max_queue: requests that may wait for a slot; the next gets 429.
    thinking_budget, thinking_grace: in tokens, where a request gives none. api_keys: a request needs one of
        them; where there are none, no key is needed. max_requests_per_key: how many requests of one key may
        run and wait at once; None: no limit.
    """

    model_name: str = "nanohybrid"
    max_queue: int = 128
    thinking_budget: int | None = None
    thinking_grace: int = 500
    api_keys: tuple[str, ...] = ()
    max_requests_per_key: int | None = None


class Service:
    """One server's model, engine and limits.

    Raises InputError where the memory of the engine cannot be allocated, and where the model cannot generate.
    """

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
        prompt = first_prompt(llm)
        check_engine(engine, prompt)
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
        """Tokens of the longest request, prompt and answer."""
        return self.loop.engine.scheduler.max_model_len

    @property
    def tool_format(self) -> ToolFormat:
        """How this model writes tool calls.

        Raises ApiError 400 where its chat template shows no format that can be read.
        """
        format = self.llm.template.tool_format
        if format is None:
            known = "<TOOLCALL>, <tool_call>, or an object with name and parameters"
            raise ApiError(
                400, f"the model's chat template shows no calls that can be read: {known}", "tools"
            )
        return format

    # Requests to prompts

    async def run_in_worker(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs in a worker thread under a deadline.

        Template, tokenizer and grammars are prepared there. Raises ApiError 400 where it takes too long or
        raises a NanohybridError.
        """
        future = asyncio.get_running_loop().run_in_executor(self._workers, without_panic, work)
        try:
            return await asyncio.wait_for(future, self.limits.prepare_seconds)
        except TimeoutError:
            raise ApiError(
                400, f"preparing the request took longer than {self.limits.prepare_seconds:g} seconds"
            ) from None
        except NanohybridError as error:
            raise ApiError(400, str(error)) from None

    def encode_conversation(
        self, messages: list[Message], tools: list[Tool] | None, thinking: bool | None
    ) -> list[int]:
        """Ids of a conversation, up to where the answer begins."""
        schemas = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        return self.llm.template.encode(
            self.llm.tokenizer, [message.plain() for message in messages], schemas, thinking
        )

    def cache_breakpoints(
        self, messages: list[Message], tools: list[Tool] | None, thinking: bool | None, prompt: list[int]
    ) -> list[int]:
        """Where other prompts are likely to differ from this one; the prefix cache saves its state there.

        After system message and tools, and before the `<think>` of the answer, which later turns do not show.
        They are found as common prefixes of ids, not by looking for special tokens.
        """
        if self.loop.engine.prefix_cache is None:
            return []
        system = [message for message in messages[:1] if message.role in ("system", "developer")]
        other = self.encode_conversation([*system, Message(role="user", content="\x01")], tools, thinking)
        schemas = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        next_turn = [message.plain() for message in messages] + [{"role": "assistant", "content": "\x01"}]
        later = self.llm.template.encode(self.llm.tokenizer, next_turn, schemas, thinking, generate=False)
        lengths = {common_prefix_length(prompt, ids) for ids in (other, later)}
        return sorted(length for length in lengths if 0 < length < len(prompt))

    @staticmethod
    def key(scope: Mapping[str, Any]) -> str:
        """A name for the API key of a request; empty where the server needs none."""
        return scope.get("nanohybrid.key") or ""

    def salt(self, scope: Mapping[str, Any], asked: str | None) -> str:
        """The salt of a request in the prefix cache: requests share cached states only within a salt.

        With several API keys each key has its own; `asked` (the request's `cache_salt`) divides it further.
        """
        key = self.key(scope) if len(self.settings.api_keys) > 1 else ""
        return f"{key}/{asked or ''}"

    def check_prompt_length(self, prompt: list[int]) -> None:
        """Raise ApiError 400 where the context has no place for a single token after the prompt."""
        if len(prompt) >= self.context:
            message = (
                f"the prompt has {len(prompt):,} tokens; the context holds {self.context:,} with the answer"
            )
            raise ApiError(400, message, "messages", "context_length_exceeded")

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 where a request names another model."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"there is no model {name!r} here; this is {self.settings.model_name!r}",
                "model",
                "model_not_found",
            )

    def check_decoding(self, body: Decoding) -> None:
        """Raise ApiError 400 where a field that all generating routes have exceeds its limit."""
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
        self, body: Decoding, prompt: list[int], max_tokens: int | None, budget: int | None, thinks: bool
    ) -> SamplingParams:
        """The sampling parameters of a request; what it leaves open is as the server says.

        max_tokens None: as many as the context holds. budget: of thinking. thinks: the answer begins in a
            trace.
        """
        left = self.context - len(prompt)
        if max_tokens is not None and max_tokens > left:
            size = f"max_tokens is {max_tokens:,} and the prompt has {len(prompt):,} tokens"
            raise ApiError(
                400,
                f"{size}: more than the context of {self.context:,}",
                "max_tokens",
                "context_length_exceeded",
            )
        default, grace = THINKING if thinks else NOT_THINKING, body.thinking_grace
        fields: dict[str, Any] = {
            "max_tokens": left if max_tokens is None else max_tokens,
            "temperature": default["temperature"] if body.temperature is None else body.temperature,
            "top_p": default["top_p"] if body.top_p is None else body.top_p,
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
            "thinking_grace": self.settings.thinking_grace if grace is None else grace,
        }
        return SamplingParams(**fields)

    def _bias(self, bias: dict[str, float]) -> dict[int, float]:
        size = self.llm.model.config.vocab_size
        for token in bias:
            if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < size):
                raise ApiError(400, f"logit_bias: {token[:40]!r} is not the id of a token", "logit_bias")
        return {int(token): value for token, value in bias.items()}

    async def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """The compiled grammar of the structured outputs, made in a worker thread.

        None where there are none.
        """
        if params.structured_outputs is None:
            return None
        return await self.run_in_worker(lambda: self.loop.engine.compile_grammar(params))

    # Generations

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        n: int,
        streaming: bool,
        permits: AdmissionPermits,
        grammar: Grammar | None = None,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
    ) -> Generation:
        """Submit `n` completions of each prompt, for which `permits` were admitted.

        The other arguments are those of `EngineLoop.submit`.
        """
        params = replace(params, n=n)
        streams: list[RequestStream] = []
        for prompt in prompts:
            streams += self.loop.submit(prompt, params, streaming, grammar, cache_breakpoints, salt)
        return Generation(self.loop, self.metrics, streams, permits)

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)


def without_panic(work: Callable[[], Result]) -> Result:
    """The result of `work`. A panic of a Rust library, which is no Exception, becomes an InputError."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as panic:
        raise InputError(
            f"this text cannot be prepared ({type(panic).__name__}: {shown(str(panic))})"
        ) from panic


def first_prompt(llm: LLM) -> list[int]:
    """A prompt to check the engine with: a chat, or text where the model has no chat template.

    Raises InputError where the template cannot be used.
    """
    try:
        return llm.encode_chat([{"role": "user", "content": "hi"}])
    except InputError:
        if not llm.template.is_default:
            raise
        return llm.encode("hi")


def check_engine(engine: Engine, prompt: Sequence[int]) -> None:
    """Generate two tokens before the server is ready, so that no client is the first to find a broken model.

    Raises NanohybridError in one line, or what torch raises where memory runs out.
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


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two prompts."""
    return next(
        (index for index, (left, right) in enumerate(zip(a, b, strict=False)) if left != right),
        min(len(a), len(b)),
    )


def model_name(path: Path | None, preset: str | None) -> str:
    """The default name of the model for clients: that of its directory."""
    return display_name(path) if path is not None else f"{preset}-random"
