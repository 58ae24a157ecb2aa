"""Server-sent events, and work that ends when the client disconnects."""

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


class ClientDisconnected(Exception):
    """The client disconnected before it was answered."""


async def wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """The result of `work`, which is cancelled where the client disconnects first.

    Raises ClientDisconnected in that case, and ApiError 504 after `seconds`.
    """
    task, disconnected = (
        asyncio.ensure_future(work),
        asyncio.ensure_future(wait_for_disconnect(request.receive)),
    )
    try:
        done, _ = await asyncio.wait(
            {task, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        raise ClientDisconnected if disconnected in done else deadline_exceeded(seconds)
    finally:
        await _cancel(task, disconnected)


def deadline_exceeded(seconds: float) -> ApiError:
    """The error of a request that took longer than `seconds`."""
    return ApiError(504, f"the request took longer than {seconds:g} seconds", code="deadline")


def sse_event(value: Any, event: str | None = None) -> bytes:
    """One server-sent event.

    Raises ValueError where JSON cannot express the value (NaN, an infinity, half a surrogate pair).
    """
    head = f"event: {event}\n" if event else ""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they are generated, at most for `seconds`. An error is sent as the last event.

    close: called at the end in any case, and at once when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], seconds: float) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"
        self.events, self.close, self.seconds = events, close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump, disconnected = (
            asyncio.ensure_future(self._pump(send)),
            asyncio.ensure_future(wait_for_disconnect(receive)),
        )
        try:
            # `_pump` has the deadline, but it may hang in sending the error to a client that reads nothing
            await asyncio.wait(
                {pump, disconnected}, timeout=self.seconds + 5, return_when=asyncio.FIRST_COMPLETED
            )
            if pump.done():
                with contextlib.suppress(OSError):  # the client disconnected between two events
                    pump.result()
        finally:
            self.close()
            await _cancel(pump, disconnected)

    async def _pump(self, send: Send) -> None:
        async def put(event: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self.seconds):
                async for event in self.events:
                    await put(event)
        except ApiError as error:
            await put(sse_event(error.body()))
        except TimeoutError:
            await put(sse_event(deadline_exceeded(self.seconds).body()))
        except OSError:
            raise  # the client disconnected
        except Exception as error:  # noqa: BLE001  a bug: status 200 was sent, so an event must tell
            traceback.print_exception(error)
            await put(sse_event(unexpected(error).body()))
        await put(b"", more=False)


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
