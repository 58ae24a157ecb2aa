"""Load for an OpenAI-compatible server, and what each request saw: for `nanohybrid bench serve`.

Open loop: requests leave at the times of a Poisson process, whether the server keeps up or not, as those of many users do; a
server that falls behind shows it as waiting and refusals. Closed loop: so many clients, each sending its next request when
its last one has ended; the server is never asked for more than it does, so it cannot show waiting.

Prompts are ids, drawn from those that the server makes of a sample text, so lengths are exact and no two prompts begin alike
(but for a common beginning that is asked for). Answers are held to their length by `ignore_eos`. Times are seconds.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanohybrid.errors import InputError
from nanohybrid.extras import require

if TYPE_CHECKING:
    import httpx

SAMPLE = (
    "The quick brown fox jumps over the lazy dog; 1,234 pages of plain words, and then some more: why not?\n"
)


@dataclass(frozen=True)
class Lengths:
    """How many tokens: always `low`, evenly from `low` to `high`, or log-normal about the median `low` with `sigma` (at most `high`)."""

    low: int
    high: int
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`256`, `64:512` or `~256` (log-normal, sigma 0.6, at most eight times the median). Raises InputError on anything else."""
        try:
            if text.startswith("~"):
                median = int(text[1:])
                result = cls(median, median * 8, 0.6)
            else:
                low, _, high = text.partition(":")
                result = cls(int(low), int(high or low))
        except ValueError:
            raise InputError(
                f"{text!r} is no length: give 256, 64:512 (evenly between) or ~256 (log-normal about it)"
            ) from None
        if not 1 <= result.low <= result.high:
            raise InputError(f"{text!r} is no length: at least 1, and the first number not above the second")
        return result

    def draw(self, rng: random.Random) -> int:
        if self.sigma:
            return min(max(round(self.low * rng.lognormvariate(0, self.sigma)), 1), self.high)
        return rng.randint(self.low, self.high)


@dataclass
class Seen:
    """One request as its client saw it. `error` is a status or the kind of a failure."""

    sent: float
    first: float | None = None
    last: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens after the first."""
        return (
            None
            if self.first is None or self.last is None or self.tokens < 2
            else (self.last - self.first) / (self.tokens - 1)
        )


@dataclass
class Point:
    """One level of load: `rate` requests a second, or `clients` at once; what came of it so far."""

    rate: float | None
    clients: int | None
    began: float = 0.0
    ended: float = 0.0
    seen: list[Seen] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What is sent at every level."""

    url: str
    requests: int
    prompt: Lengths
    output: Lengths
    prefix: int = 0
    seed: int = 0
    key: str | None = None
    model: str | None = None
    timeout: float = 600.0


class Load:
    """Runs levels one after the other. `points` holds all that was measured, also after a cancellation."""

    def __init__(self, job: Job, done: Callable[[Point], object] = lambda point: None) -> None:
        self.job, self.done = job, done
        self.points: list[Point] = []
        self.model = job.model or ""
        self._ids: list[int] = []

    async def run(self, rates: Iterable[float], clients: Iterable[int]) -> None:
        """Every rate, then every number of clients. Raises InputError where there is no server to talk to."""
        httpx = require("httpx", "serve")
        headers = {"authorization": f"Bearer {self.job.key}"} if self.job.key else {}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.job.url, headers=headers, timeout=self.job.timeout, limits=limits
        ) as client:
            await self._meet(client)
            for rate in rates:
                await self._level(client, Point(rate, None))
            for count in clients:
                await self._level(client, Point(None, count))

    async def _meet(self, client: "httpx.AsyncClient") -> None:
        """Ask for the model and its ids of the sample text, and let one request warm the server."""
        httpx = require("httpx", "serve")
        try:
            models = await client.get("/v1/models")
            models.raise_for_status()
            self.model = self.model or models.json()["data"][0]["id"]
            answer = await client.post(
                "/tokenize", json={"model": self.model, "prompt": SAMPLE, "add_special_tokens": False}
            )
            answer.raise_for_status()
            self._ids = answer.json()["tokens"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.job.url}: no such server answers there ({error or type(error).__name__})"
            ) from None
        warm = await self._ask(client, self._prompts(random.Random(-1)), 2)
        if warm.error is not None:
            raise InputError(
                f"{self.job.url}: the first request failed ({warm.error}); are the lengths within its context?"
            )

    async def _level(self, client: "httpx.AsyncClient", point: Point) -> None:
        self.points.append(point)
        rng = random.Random(self.job.seed)  # every level sends the same requests
        work = [(self._prompts(rng), self.job.output.draw(rng)) for _ in range(self.job.requests)]
        point.began = point.ended = time.perf_counter()

        async def one(prompt: list[int], tokens: int) -> None:
            seen = await self._ask(client, prompt, tokens)
            point.seen.append(seen)
            point.ended = time.perf_counter()
            self.done(point)

        async with asyncio.TaskGroup() as tasks:
            if point.rate is not None:
                async for prompt, tokens in _poisson(work, point.rate, rng):
                    tasks.create_task(one(prompt, tokens))
            else:
                queue = iter(work)
                for _ in range(point.clients or 1):
                    tasks.create_task(_each(queue, one))

    def _prompts(self, rng: random.Random) -> list[int]:
        begin = random.Random(self.job.seed).choices(self._ids, k=self.job.prefix)
        return begin + rng.choices(self._ids, k=self.job.prompt.draw(rng))

    async def _ask(self, client: "httpx.AsyncClient", prompt: list[int], tokens: int) -> Seen:
        httpx = require("httpx", "serve")
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        seen = Seen(time.perf_counter(), prompt_tokens=len(prompt))
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    seen.error = str(answer.status_code)
                    return seen
                async for line in answer.aiter_lines():
                    self._read(line, seen)
        except (
            httpx.HTTPError,
            ValueError,
            KeyError,
        ) as error:  # the last two: an answer that is not what it should be
            seen.error = type(error).__name__
        if seen.error is None and not seen.tokens:
            seen.error = "cut off"
        return seen

    @staticmethod
    def _read(line: str, seen: Seen) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        chunk: dict[str, Any] = json.loads(line[6:])
        if "error" in chunk:
            seen.error = str(chunk["error"].get("code") or "error")
        elif chunk.get("choices"):
            seen.last = time.perf_counter()
            seen.first = seen.first or seen.last
        if chunk.get("usage"):
            seen.tokens = chunk["usage"]["completion_tokens"]


async def _poisson(
    work: list[tuple[list[int], int]], rate: float, rng: random.Random
) -> AsyncIterator[tuple[list[int], int]]:
    """Each piece of work at its time; late ones at once, so that the process is never slowed by what it measures."""
    at = time.perf_counter()
    for one in work:
        await asyncio.sleep(max(at - time.perf_counter(), 0))
        yield one
        at += rng.expovariate(rate)


async def _each(queue: Iterator[tuple[list[int], int]], one: Callable[[list[int], int], Any]) -> None:
    for prompt, tokens in queue:
        await one(prompt, tokens)
