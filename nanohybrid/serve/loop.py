"""The one thread that owns the engine, and what the event loop holds of it: tickets.

The event loop puts what it wants into an inbox; the thread empties it between two steps, so a cancelled request is gone before
the next one. After each step everything that was said goes back in one call. Nothing else is shared, and nothing is pickled.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from nanohybrid.engine import Completion, Engine, SamplingParams
from nanohybrid.engine.params import Top
from nanohybrid.engine.request import Request
from nanohybrid.errors import InputError
from nanohybrid.serve.errors import ApiError, busy
from nanohybrid.serve.guided import Guide, GuidedRunner


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
        self.guide: Guide | None = None
        self.checkpoint_at: tuple[int, ...] = ()  # where the prompt leaves a checkpoint, for whoever has the same salt
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


class EngineLoop:
    """Runs an engine in a thread. Everything but `_work` and below is called in the event loop."""

    def __init__(self, engine: Engine, max_queued: int, queue_seconds: float = float("inf"), on_death: Callable[[], None] = lambda: None):
        self.engine = engine
        self.runner = engine.runner = GuidedRunner(engine.runner, engine.tokenizer)
        self.capacity = engine.scheduler.slots.size + max_queued
        self.queue_seconds, self.on_death = queue_seconds, on_death
        self.held = 0  # places taken, of `capacity`
        self.dead: BaseException | None = None
        self.draining = False
        self.last_seconds = 1.0  # how long recent requests took, for Retry-After
        self._inbox: deque[Callable[[], None]] = deque()
        self._ring = threading.Condition()
        self._stop = False
        self._tickets: dict[int, Ticket] = {}  # by the engine's request id
        self._waiting: list[Ticket] = []
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step in progress."""
        with self._ring:
            self._stop = True
            self._ring.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and self.dead is None and not self.draining

    def take_places(self, count: int) -> None:
        """Hold places for `count` generations, or raise 429."""
        self.check()
        if self.held + count > self.capacity:
            seconds = min(max(round(self.last_seconds), 1), 60)
            raise busy(f"the queue is full: {self.held} requests of at most {self.capacity} are running or waiting", seconds)
        self.held += count

    def give_places(self, count: int) -> None:
        self.held -= count

    def check(self) -> None:
        """Raise 503 where nothing can be served."""
        if self.dead is not None:
            raise ApiError(503, f"the engine has failed: {type(self.dead).__name__}", code="engine_dead")

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        live: bool = True,
        guides: Sequence[Guide] = (),
        checkpoint_at: Sequence[int] = (),
        salt: str = "",
    ) -> list[Ticket]:
        """Ask for `params.n` choices of a prompt; `live` hands over each step's text, else only the end is told.

        `guides` hold each choice to a grammar.
        """
        tickets = [Ticket(prompt, params, live) for _ in range(params.n)]
        tickets[0].checkpoint_at, tickets[0].salt = tuple(checkpoint_at), salt
        for ticket, guide in zip(tickets, guides, strict=False):
            ticket.guide = guide
        self._tell(lambda: self._add(tickets))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Free what it holds before the next step; nothing more is told of it. One that has ended is left as it is."""
        self._tell(lambda: self._cancel(ticket))

    def _tell(self, command: Callable[[], None]) -> None:
        with self._ring:
            self._inbox.append(command)
            self._ring.notify()
        if self.dead is not None:
            self._fail_all()

    # The engine's thread

    def _work(self) -> None:
        try:
            while True:
                with self._ring:
                    self._ring.wait_for(lambda: self._inbox or self.engine.busy or self._stop)
                    if self._stop:
                        return
                while self._inbox:
                    self._inbox.popleft()()
                if self.engine.busy:
                    self._step()
        except Exception as error:  # noqa: BLE001  whatever it was, nobody may be left waiting
            self.dead = error
            self._call(self._fail_all)
            self._call(self.on_death)

    def _add(self, tickets: list[Ticket]) -> None:
        try:
            first = tickets[0]
            requests = self.engine.add_choices(first.prompt, first.params, stream=True, checkpoint_at=first.checkpoint_at, salt=first.salt)
        except InputError as error:
            for ticket in tickets:
                self._call(ticket.fail, ApiError(400, str(error)))
            return
        for ticket, request in zip(tickets, requests, strict=True):
            ticket.request = request
            self._tickets[request.id] = ticket
            if ticket.guide is not None:
                self.runner.guides[request.id] = ticket.guide
        self._waiting += tickets

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.request is not None and self._tickets.pop(ticket.request.id, None) is not None:
            self.runner.guides.pop(ticket.request.id, None)
            self.engine.cancel(ticket.request)
            self._waiting = [other for other in self._waiting if other is not ticket]

    def _step(self) -> None:
        advanced = self.engine.step()
        now = time.monotonic()
        said: list[tuple[Ticket, Update]] = []
        for request in advanced:
            ticket = self._tickets[request.id]
            ticket.first = ticket.first or now
            ticket.last = now
            if request.finished:
                del self._tickets[request.id]
                self.runner.guides.pop(request.id, None)
                if ticket.guide is not None and ticket.guide.broken:
                    error = f"the form cannot be kept any longer: {ticket.guide.broken}"
                    self._call(ticket.fail, ApiError(400, error, code="form_too_complex"))
            if request.finished or ticket.live:
                said.append((ticket, self._news(ticket, request)))
        if self._waiting:
            self._look_at_the_queue(now)
        if said:
            self._call(_deliver, said)

    def _news(self, ticket: Ticket, request: Request) -> Update:
        begin, ticket.seen = ticket.seen, len(request.tokens)
        scores = request.scores if begin == 0 else None
        return Update(
            request.take_text(),
            request.tokens[begin:],
            [] if request.logprobs is None else request.logprobs[begin:],
            [] if request.top_logprobs is None else request.top_logprobs[begin:],
            [] if scores is None else scores.logprobs,
            [] if scores is None else scores.top,
            request.completion() if request.finished else None,
        )

    def _look_at_the_queue(self, now: float) -> None:
        still: list[Ticket] = []
        for ticket in self._waiting:
            request = ticket.request
            if request is None or request.slot is not None or request.tokens:
                ticket.started = now
            elif now - ticket.arrived > self.queue_seconds:
                self._tickets.pop(request.id, None)
                self.runner.guides.pop(request.id, None)
                self.engine.cancel(request)
                self._call(ticket.fail, busy(f"no slot was free for {self.queue_seconds:g} seconds", 10))
            else:
                still.append(ticket)
        self._waiting = still

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _fail_all(self) -> None:
        """The engine is dead: in the event loop, since its thread is too."""
        while self._inbox:
            self._inbox.popleft()()
        for ticket in self._tickets.values():
            ticket.fail(ApiError(500, "the engine has failed; the request is lost", code="engine_dead"))
        self._tickets.clear()


def _deliver(said: list[tuple[Ticket, Update]]) -> None:
    for ticket, update in said:
        ticket.put(update)
