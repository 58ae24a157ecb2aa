"""Load generator for an OpenAI-compatible server, for `nanohybrid bench serve`.

Open loop: requests start at the times of a Poisson process, independent of the server, as those of many users
do. If the server is too slow, its queue grows, and requests wait or are refused. Closed loop: a fixed number
of clients each send the next request when the last one has ended. Such a load never exceeds the server's
speed, so it does not show queueing.

Prompts are random token ids, drawn from those of a sample text, so lengths are exact and prompts share no
prefix except the one asked for. `ignore_eos` fixes the length of the output. Times are in seconds.
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
    """Token counts:

    `low`; uniform in [low, high]; or log-normal with median `low` and `sigma`, at most `high`.
    """

    low: int
    high: int
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Parse `256`, `64:512` (uniform) or `~256` (log-normal, sigma 0.6, at most eight times the median).

        Raises InputError for any other text.
        """
        try:
            if text.startswith("~"):
                median = int(text[1:])
                result = cls(median, median * 8, 0.6)
            else:
                low, _, high = text.partition(":")
                result = cls(int(low), int(high or low))
        except ValueError:
            raise InputError(
                f"{text!r} is not a length; give 256, 64:512 (uniform) or ~256 (log-normal with this median)"
            ) from None
        if not 1 <= result.low <= result.high:
            raise InputError(
                f"{text!r} is not a length; the minimum is 1, and the first number must not exceed the second"
            )
        return result

    def draw(self, rng: random.Random) -> int:
        if self.sigma:
            return min(max(round(self.low * rng.lognormvariate(0, self.sigma)), 1), self.high)
        return rng.randint(self.low, self.high)


@dataclass
class Seen:
    """One request as its client saw it. `error` is an HTTP status or the type of a failure."""

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
    """One level of load (`rate` requests per second, or `clients` at once) and its requests so far."""

    rate: float | None
    clients: int | None
    began: float = 0.0
    ended: float = 0.0
    seen: list[Seen] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """The requests of every level, and the server that they are sent to."""

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
    """Runs levels one after another. `points` holds all measurements, also after a cancellation."""

    def __init__(self, job: Job, done: Callable[[Point], object] = lambda point: None) -> None:
        self.job, self.done = job, done
        self.points: list[Point] = []
        self.model = job.model or ""
        self._ids: list[int] = []

    async def run(self, rates: Iterable[float], clients: Iterable[int]) -> None:
        """Run every rate, then every number of clients. Raises InputError if no suitable server answers."""
        httpx = require("httpx", "serve")
        headers = {"authorization": f"Bearer {self.job.key}"} if self.job.key else {}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.job.url, headers=headers, timeout=self.job.timeout, limits=limits
        ) as client:
            await self._warm_up(client)
            for rate in rates:
                await self._level(client, Point(rate, None))
            for count in clients:
                await self._level(client, Point(None, count))

    async def _warm_up(self, client: "httpx.AsyncClient") -> None:
        """Get the model's name and the ids of the sample text, and warm up the server with one request."""
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
                f"{self.job.url}: no server with /v1/models and /tokenize answers there "
                f"({error or type(error).__name__})"
            ) from None
        warm = await self._ask(client, self._prompts(random.Random(-1)), 2)
        if warm.error is not None:
            raise InputError(
                f"{self.job.url}: the first request failed ({warm.error}); "
                "check that the lengths fit in the context of the model"
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
        ) as error:  # ValueError, KeyError: a malformed response
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
    """Yield each request at its Poisson time, or at once if that has passed."""
    at = time.perf_counter()
    for one in work:
        await asyncio.sleep(max(at - time.perf_counter(), 0))
        yield one
        at += rng.expovariate(rate)


async def _each(queue: Iterator[tuple[list[int], int]], one: Callable[[list[int], int], Any]) -> None:
    for prompt, tokens in queue:
        await one(prompt, tokens)
