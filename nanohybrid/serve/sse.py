"""Answers on the wire: server-sent events, and work that ends when the client is gone."""

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanohybrid.serve.errors import ApiError, unexpected

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """The result of `work`; it is cancelled, and ClientGone raised, where the client leaves first. 504 after so many seconds."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        done, _ = await asyncio.wait({task, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientGone if left in done else late(seconds)
    finally:
        await _end(task, left)


def late(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than {seconds:g} seconds", code="deadline")


def data(value: Any, event: str | None = None) -> bytes:
    """One server-sent event. Raises ValueError where the value has no form in JSON (NaN, an infinity, half a surrogate pair)."""
    head = f"event: {event}\n" if event else ""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come. `close` is called in any case, at once when the client is gone; an error is a last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], seconds: float) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"
        self.events, self.close, self.seconds = events, close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump, left = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(gone(receive))
        try:
            # the deadline is the pump's; it may hang in telling so to a client that reads nothing
            await asyncio.wait({pump, left}, timeout=self.seconds + 5, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                with contextlib.suppress(OSError):  # the client left between two events
                    pump.result()
        finally:
            self.close()
            await _end(pump, left)

    async def _pump(self, send: Send) -> None:
        async def put(event: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self.seconds):
                async for event in self.events:
                    await put(event)
        except ApiError as error:
            await put(data(error.body()))
        except TimeoutError:
            await put(data(late(self.seconds).body()))
        except OSError:
            raise  # the client left
        except Exception as error:  # noqa: BLE001  a bug: the status was sent, and the end must not look like a good one
            traceback.print_exception(error)
            await put(data(unexpected(error).body()))
        await put(b"", more=False)


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
