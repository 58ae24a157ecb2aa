"""The completions of one HTTP request: read whole or as a stream of deltas, and cancelled together."""

import asyncio
from collections.abc import AsyncIterator

from nanohybrid.engine import Completion
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.loop import AdmissionPermits, EngineLoop
from nanohybrid.serve.metrics import Metrics
from nanohybrid.serve.stream import Delta, RequestStream


class Generation:
    """The streams of one request. `close` frees what they hold, however the request ended."""

    def __init__(
        self, loop: EngineLoop, metrics: Metrics, streams: list[RequestStream], permits: AdmissionPermits
    ) -> None:
        self.loop, self.metrics, self.streams, self.permits = loop, metrics, streams, permits
        self._closed = False

    async def all(self) -> list[tuple[Delta, Completion]]:
        """Everything of every completion, once all have ended. Raises ApiError where one failed."""
        results = []
        for stream in self.streams:
            async for delta in stream.deltas():
                if delta.completion is not None:
                    results.append((delta, self._finished(stream, delta.completion)))
        return results

    async def each(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index, delta) of all completions as they are written. Raises ApiError where one failed."""
        if len(self.streams) == 1:
            async for delta in self.streams[0].deltas():
                if delta.completion is not None:
                    self._finished(self.streams[0], delta.completion)
                yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

        async def pump(index: int, stream: RequestStream) -> None:
            try:
                async for delta in stream.deltas():
                    queue.put_nowait((index, delta))
            except ApiError as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(self.streams)]
        try:
            left = len(tasks)
            while left:
                index, result = await queue.get()
                if isinstance(result, Exception):
                    raise result
                if result.completion is not None:
                    left -= 1
                    self._finished(self.streams[index], result.completion)
                yield index, result
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Cancel what has not ended, and release the permits. A second call does nothing."""
        if not self._closed:
            self._closed = True
            for stream in self.streams:
                if not stream.ended:
                    self.metrics.cancelled()
                    self.loop.cancel(stream)
            self.permits.release()

    def _finished(self, stream: RequestStream, completion: Completion) -> Completion:
        """Count a completion. Raises ApiError where it failed."""
        self.metrics.finished(stream, completion)
        self.loop.last_seconds = stream.last_token_time - stream.arrival_time
        if completion.error is not None:
            status = 400 if completion.error.code == "grammar_too_complex" else 500
            raise ApiError(status, completion.error.message, code=completion.error.code)
        return completion
