"""One completion, as the event loop sees it: the text that was written and not yet read, and how it ended."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from nanohybrid.engine import Completion, SamplingParams
from nanohybrid.engine.params import Top
from nanohybrid.engine.request import Request
from nanohybrid.engine.structured_output import Grammar


@dataclass
class Delta:
    """What was written since the last delta. The scores of the prompt come with the first one."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: Top = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: Top = field(default_factory=list)
    completion: Completion | None = None


class RequestStream:
    """The handle of one completion. Times are in seconds of `time.monotonic`.

    streaming: a delta comes with each step; else there is one, at the end.
    """

    def __init__(self, prompt: list[int], params: SamplingParams, streaming: bool) -> None:
        self.prompt, self.params, self.streaming = prompt, params, streaming
        self.arrival_time = time.monotonic()
        self.scheduled_time: float | None = None  # when it got a slot
        self.first_token_time: float | None = None
        self.last_token_time = self.arrival_time
        self.grammar: Grammar | None = None
        self.cache_breakpoints: tuple[int, ...] = ()
        self.salt = ""
        self.request: Request | None = None  # used by the engine's thread only
        self.num_sent = 0  # tokens that were handed over; used by the engine's thread only
        self._pending = Delta()
        self._ended = False
        self._failure: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Add a delta to what is not yet read."""
        pending = self._pending
        pending.text += delta.text
        pending.tokens += delta.tokens
        pending.logprobs += delta.logprobs
        pending.top += delta.top
        pending.prompt_logprobs += delta.prompt_logprobs
        pending.prompt_top += delta.prompt_top
        pending.completion = delta.completion
        self._ended = delta.completion is not None
        self._changed.set()

    @property
    def ended(self) -> bool:
        """Whether it is complete or has failed."""
        return self._ended or self._failure is not None

    def fail(self, error: Exception) -> None:
        """End it with an error, which `deltas` raises. A second error is ignored."""
        self._failure = self._failure or error
        self._changed.set()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield all deltas to the end; a slow reader gets several as one.

        Raises the error where it failed.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
            delta, self._pending = self._pending, Delta()
            yield delta
            if delta.completion is not None:
                return
