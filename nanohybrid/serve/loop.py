"""The thread that owns the engine. The event loop holds a RequestStream for each completion.

The event loop posts commands to an inbox. The thread runs them between two steps, so a cancelled request is
gone before the next step. After each step all deltas go back to the event loop in one call. Nothing else is
shared.
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
from nanohybrid.serve.errors import ApiError, queue_full
from nanohybrid.serve.malloc_trim import MallocTrim
from nanohybrid.serve.stream import Delta, RequestStream


class AdmissionPermits:
    """Permits for `count` completions to wait and run, until they are released.

    Releasing twice is harmless.
    """

    def __init__(self, loop: "EngineLoop", count: int, key: str) -> None:
        self._loop, self.count, self.key = loop, count, key
        loop.num_admitted += count
        loop.admitted_by_key[key] += count

    def release(self) -> None:
        self._loop.num_admitted -= self.count
        self._loop.admitted_by_key[self.key] -= self.count
        self._loop.admitted_by_key += Counter()  # drops keys without permits
        self.count = 0


class EngineLoop:
    """Runs an engine in a thread. All methods above `_run` are called in the event loop.

    max_queue: completions that may wait beside those that run. queue_seconds: how long one may wait for a
        slot.
    on_death: called in the event loop when the engine has failed for good. max_requests_per_key: completions
        of one API key that may wait and run; None: no limit. test_prompt: ids after which any model can
        generate; the engine is checked with them after a step that raised.
    """

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        queue_seconds: float = float("inf"),
        on_death: Callable[[], None] = lambda: None,
        max_requests_per_key: int | None = None,
        test_prompt: Sequence[int] = (0,),
    ) -> None:
        self.engine = engine
        self.capacity = engine.scheduler.slots.size + max_queue
        self.queue_seconds, self.on_death = queue_seconds, on_death
        self.max_requests_per_key, self.test_prompt = max_requests_per_key, test_prompt
        self.num_admitted = 0  # completions that wait or run, at most `capacity`
        self.admitted_by_key: Counter[str] = Counter()
        self._trim = MallocTrim()
        self.dead: BaseException | None = None
        self.draining = False
        self.last_seconds = 1.0  # how long the last request took, for Retry-After
        self._inbox: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()
        self._stop = False
        self._streams: dict[int, RequestStream] = {}  # by the engine's request id
        self._waiting: list[RequestStream] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step in progress."""
        with self._condition:
            self._stop = True
            self._condition.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @property
    def running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and self.dead is None and not self.draining

    def admit(self, count: int, key: str = "") -> AdmissionPermits:
        """Permits for `count` completions. Raises ApiError 429 where the queue or the key's share is full."""
        self.check()
        limit, of_key = self.max_requests_per_key, self.admitted_by_key[key]
        if limit is not None and of_key + count > limit:
            raise queue_full(
                f"this key has {of_key} requests already; at most {limit} at once are allowed", 1
            )
        if self.num_admitted + count > self.capacity:
            seconds = min(max(round(self.last_seconds), 1), 60)
            raise queue_full(
                f"the queue is full: {self.num_admitted} requests of at most {self.capacity} "
                "are running or waiting",
                seconds,
            )
        return AdmissionPermits(self, count, key)

    def check(self) -> None:
        """Raise ApiError 503 where the engine has failed or is stalled."""
        if self.dead is not None:
            raise ApiError(503, f"the engine has failed: {type(self.dead).__name__}", code="engine_dead")
        if self.engine.watchdog.stalled:
            limit = self.engine.watchdog.limit
            raise ApiError(
                503, f"a step of the engine has taken more than {limit:g} seconds", code="engine_stalled"
            )

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        streaming: bool = True,
        grammar: Grammar | None = None,
        cache_breakpoints: Sequence[int] = (),
        salt: str = "",
    ) -> list[RequestStream]:
        """Request `params.n` completions of a prompt of ids.

        streaming: hand over the text of each step. grammar: the compiled `params.structured_outputs`, so that
            no step waits for the compiler. cache_breakpoints, salt: those of `Engine.add`.
        """
        streams = [RequestStream(prompt, params, streaming) for _ in range(params.n)]
        first = streams[0]
        first.cache_breakpoints, first.salt, first.grammar = tuple(cache_breakpoints), salt, grammar
        self._post(lambda: self._add(streams))
        return streams

    def cancel(self, stream: RequestStream) -> None:
        """Free what a completion holds before the next step. No delta follows.

        An ended one is left as it is.
        """
        self._post(lambda: self._cancel(stream))

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()
        if self.dead is not None:
            self._fail_all()

    # The engine's thread

    def _run(self) -> None:
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._inbox or self.engine.busy or self._stop)
                    if self._stop:
                        return
                while self._inbox:
                    self._inbox.popleft()()
                if self.engine.busy:
                    try:
                        self._step()
                    except Exception as error:  # noqa: BLE001  its requests fail, not the server
                        self._recover(error)
                    self._trim()
        except BaseException as error:  # noqa: BLE001  a panic in Rust is no Exception; no client may hang
            self.dead = error
            self._call_soon(self._fail_all)
            self._call_soon(self.on_death)

    def _recover(self, error: Exception) -> None:
        """Continue after a step that raised: cancel all requests, and check that the engine still generates.

        The requests fail with 500, and the server goes on. Where the engine no longer generates, this raises,
        and the server ends.
        """
        traceback.print_exception(error)
        self.engine.reset()
        self.engine.check(self.test_prompt)
        print(
            "nanohybrid: the engine continues; the requests of the step that failed are lost", file=sys.stderr
        )
        failure = ApiError(
            500, f"the engine failed on this step ({type(error).__name__}): ask again", code="step_failed"
        )
        for stream in self._streams.values():
            self._call_soon(stream.fail, failure)
        self._streams.clear()
        self._waiting.clear()

    def _add(self, streams: list[RequestStream]) -> None:
        try:
            first = streams[0]
            requests = self.engine.add_choices(
                first.prompt,
                first.params,
                stream=True,
                cache_breakpoints=first.cache_breakpoints,
                salt=first.salt,
                grammar=first.grammar,
            )
        except InputError as error:
            self._refuse(streams, ApiError(400, str(error)))
            return
        except Exception as error:  # noqa: BLE001  a bug: this request fails, and no other
            traceback.print_exception(error)
            reason = type(error).__name__
            self._refuse(streams, ApiError(500, f"the engine cannot take this request ({reason})"))
            return
        for stream, request in zip(streams, requests, strict=True):
            stream.request = request
            self._streams[request.id] = stream
        self._waiting += streams

    def _refuse(self, streams: list[RequestStream], error: ApiError) -> None:
        for stream in streams:
            self._call_soon(stream.fail, error)

    def _cancel(self, stream: RequestStream) -> None:
        if stream.request is not None and self._streams.pop(stream.request.id, None) is not None:
            self.engine.cancel(stream.request)
            self._waiting = [other for other in self._waiting if other is not stream]

    def _step(self) -> None:
        advanced = self.engine.step()
        now = time.monotonic()
        emitted: list[tuple[RequestStream, Delta]] = []
        ended: list[int] = []
        for request in advanced:
            stream = self._streams[request.id]
            stream.first_token_time = stream.first_token_time or now
            stream.last_token_time = now
            if request.finished:
                ended.append(request.id)
            if request.finished or stream.streaming:
                emitted.append((stream, self._delta(stream, request)))
        for request_id in ended:
            del self._streams[request_id]
        if emitted:
            self._call_soon(_deliver, emitted)
        if self._waiting:
            self._expire_queued(now)

    @staticmethod
    def _delta(stream: RequestStream, request: Request) -> Delta:
        begin, stream.num_sent = stream.num_sent, len(request.tokens)
        scores = request.scores if begin == 0 else None
        return Delta(
            request.take_text(),
            request.tokens[begin:],
            [] if request.logprobs is None else request.logprobs[begin:],
            [] if request.top_logprobs is None else request.top_logprobs[begin:],
            [] if scores is None else scores.logprobs,
            [] if scores is None else scores.top,
            request.completion() if request.finished else None,
        )

    def _expire_queued(self, now: float) -> None:
        """Fail the requests that have waited for a slot too long."""
        waiting: list[RequestStream] = []
        for stream in self._waiting:
            request = stream.request
            if request is None or request.slot is not None or request.tokens:
                stream.scheduled_time = now
            elif now - stream.arrival_time > self.queue_seconds:
                self._streams.pop(request.id, None)
                self.engine.cancel(request)
                self._call_soon(
                    stream.fail, queue_full(f"no slot was free for {self.queue_seconds:g} seconds", 10)
                )
            else:
                waiting.append(stream)
        self._waiting = waiting

    def _call_soon(self, function: Callable[..., object], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _fail_all(self) -> None:
        """The engine is dead: fail all streams. Runs in the event loop, since the thread has ended."""
        while self._inbox:
            self._inbox.popleft()()
        for stream in self._streams.values():
            stream.fail(ApiError(500, "the engine has failed; the request is lost", code="engine_dead"))
        self._streams.clear()


def _deliver(emitted: list[tuple[RequestStream, Delta]]) -> None:
    for stream, delta in emitted:
        stream.put(delta)
