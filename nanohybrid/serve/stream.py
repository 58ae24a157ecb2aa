"""One generation, as the event loop holds it: what was said and not yet read, and how it ended."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from nanohybrid.engine import Completion, SamplingParams
from nanohybrid.engine.params import Top
from nanohybrid.engine.request import Request
from nanohybrid.engine.structured_output import Grammar


@dataclass
class Update:
    """What was said since the last look."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: Top = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)  # told once, with the first token
    prompt_top: Top = field(default_factory=list)
    completion: Completion | None = None


class Ticket:
    """One generation, as the event loop sees it. Times are of `time.monotonic`."""

    def __init__(self, prompt: list[int], params: SamplingParams, live: bool) -> None:
        self.prompt, self.params, self.live = prompt, params, live
        self.arrived = time.monotonic()
        self.started: float | None = None  # when it got its slot
        self.first: float | None = None  # when its first token came
        self.last = self.arrived
        self.grammar: Grammar | None = None
        self.cache_breakpoints: tuple[
            int, ...
        ] = ()  # where the prompt leaves a checkpoint, for whoever has the same salt
        self.salt = ""
        self.request: Request | None = None  # the engine thread's
        self.seen = 0  # the engine thread's: tokens that were handed over
        self._pending = Update()
        self._ended = False
        self._failure: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, update: Update) -> None:
        pending = self._pending
        pending.text += update.text
        pending.tokens += update.tokens
        pending.logprobs += update.logprobs
        pending.top += update.top
        pending.prompt_logprobs += update.prompt_logprobs
        pending.prompt_top += update.prompt_top
        pending.completion = update.completion
        self._ended = update.completion is not None
        self._changed.set()

    @property
    def over(self) -> bool:
        """Whether it has ended, by itself or by a failure."""
        return self._ended or self._failure is not None

    def fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._changed.set()

    async def updates(self) -> AsyncIterator[Update]:
        """Everything that is said, to the end; a slow reader gets more at once. Raises what went wrong."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
            update, self._pending = self._pending, Update()
            yield update
            if update.completion is not None:
                return
