"""The one thread that owns the engine, and what the event loop holds of it: tickets.

The event loop puts what it wants into an inbox; the thread empties it between two steps, so a cancelled request is gone before
the next one. After each step everything that was said goes back in one call. Nothing else is shared, and nothing is pickled.
"""

import asyncio
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence

from nanohybrid.engine import Engine, SamplingParams
from nanohybrid.engine.request import Request
from nanohybrid.engine.structured_output import Grammar
from nanohybrid.errors import InputError
from nanohybrid.serve.errors import ApiError, busy
from nanohybrid.serve.malloc_trim import Trim
from nanohybrid.serve.stream import Ticket, Update


class Places:
    """Places of a request, running or waiting, until they are given back; giving them twice is once."""

    def __init__(self, loop: "EngineLoop", count: int, key: str) -> None:
        self._loop, self.count, self.key = loop, count, key
        loop.held += count
        loop.held_by[key] += count

    def give(self) -> None:
        self._loop.held -= self.count
        self._loop.held_by[self.key] -= self.count
        self._loop.held_by += Counter()  # forgets keys that hold nothing
        self.count = 0


class EngineLoop:
    """Runs an engine in a thread. Everything but `_work` and below is called in the event loop."""

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        queue_seconds: float = float("inf"),
        on_death: Callable[[], None] = lambda: None,
        max_requests_per_key: int | None = None,
        test_prompt: Sequence[int] = (0,),
    ) -> None:
        """test_prompt: ids that any model can go on from; the engine is tried on them after a step that failed."""
        self.engine = engine
        self.capacity = engine.scheduler.slots.size + max_queue
        self.queue_seconds, self.on_death = queue_seconds, on_death
        self.max_requests_per_key, self.test_prompt = max_requests_per_key, test_prompt
        self.held = 0  # places taken, of `capacity`
        self.held_by: Counter[str] = Counter()  # ... by the keys of those who took them
        self._trim = Trim()
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

    def take_places(self, count: int, key: str = "") -> Places:
        """Hold places for `count` generations, or raise 429."""
        self.check()
        if self.max_requests_per_key is not None and self.held_by[key] + count > self.max_requests_per_key:
            raise busy(
                f"this key has {self.held_by[key]} requests already; at most {self.max_requests_per_key} at once are allowed",
                1,
            )
        if self.held + count > self.capacity:
            seconds = min(max(round(self.last_seconds), 1), 60)
            raise busy(
                f"the queue is full: {self.held} requests of at most {self.capacity} are running or waiting",
                seconds,
            )
        return Places(self, count, key)

    def check(self) -> None:
        """Raise 503 where nothing can be served."""
        if self.dead is not None:
            raise ApiError(503, f"the engine has failed: {type(self.dead).__name__}", code="engine_dead")
        if self.engine.watchdog.stalled:
            limit = self.engine.watchdog.limit
            raise ApiError(
                503, f"the engine has not come out of a step for {limit:g} seconds", code="engine_stalled"
            )

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        live: bool = True,
        grammar: Grammar | None = None,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
    ) -> list[Ticket]:
        """Ask for `params.n` choices of a prompt; `live` hands over each step's text, else only the end is told.

        `grammar` is the compiled one of `params.structured_outputs`, so that no step waits for the compiler.
        """
        tickets = [Ticket(prompt, params, live) for _ in range(params.n)]
        tickets[0].cache_breakpoints, tickets[0].salt, tickets[0].grammar = (
            tuple(cache_breakpoints),
            salt,
            grammar,
        )
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
                    try:
                        self._step()
                    except Exception as error:  # noqa: BLE001  a bug: these requests fail, and the next ones are served
                        self._recover(error)
                    self._trim()
        except BaseException as error:  # noqa: BLE001  a library's panic is no Exception; nobody may be left waiting
            self.dead = error
            self._call(self._fail_all)
            self._call(self.on_death)

    def _recover(self, error: Exception) -> None:
        """A step raised. Free what all requests hold and see that the engine still generates; then they fail with 500, and
        the server goes on. Raises what the engine raises where it does not, which ends the server."""
        traceback.print_exception(error)
        self.engine.reset()
        self.engine.check(self.test_prompt)
        print(
            "nanohybrid: the engine goes on; the requests of the step that failed are lost", file=sys.stderr
        )
        failure = ApiError(
            500, f"the engine failed on this step ({type(error).__name__}): ask again", code="step_failed"
        )
        for ticket in self._tickets.values():
            self._call(ticket.fail, failure)
        self._tickets.clear()
        self._waiting.clear()

    def _add(self, tickets: list[Ticket]) -> None:
        try:
            first = tickets[0]
            requests = self.engine.add_choices(
                first.prompt,
                first.params,
                stream=True,
                cache_breakpoints=first.cache_breakpoints,
                salt=first.salt,
                grammar=first.grammar,
            )
        except InputError as error:
            self._refuse(tickets, ApiError(400, str(error)))
            return
        except Exception as error:  # noqa: BLE001  a bug: this request fails, and no other
            traceback.print_exception(error)
            self._refuse(
                tickets, ApiError(500, f"the engine cannot take this request ({type(error).__name__})")
            )
            return
        for ticket, request in zip(tickets, requests, strict=True):
            ticket.request = request
            self._tickets[request.id] = ticket
        self._waiting += tickets

    def _refuse(self, tickets: list[Ticket], error: ApiError) -> None:
        for ticket in tickets:
            self._call(ticket.fail, error)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.request is not None and self._tickets.pop(ticket.request.id, None) is not None:
            self.engine.cancel(ticket.request)
            self._waiting = [other for other in self._waiting if other is not ticket]

    def _step(self) -> None:
        advanced = self.engine.step()
        now = time.monotonic()
        said: list[tuple[Ticket, Update]] = []
        ended: list[int] = []
        for request in advanced:
            ticket = self._tickets[request.id]
            ticket.first = ticket.first or now
            ticket.last = now
            if request.finished:
                ended.append(request.id)
            if request.finished or ticket.live:
                said.append((ticket, self._news(ticket, request)))
        for request_id in ended:
            del self._tickets[request_id]
        if said:
            self._call(_deliver, said)
        if self._waiting:
            self._look_at_the_queue(now)

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
