"""Runs the server: uvicorn in one process, draining on SIGTERM; exit code 1 where the engine failed."""

import asyncio
import sys
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanohybrid.errors import InputError
from nanohybrid.serve.app import application
from nanohybrid.serve.service import Service


class Server(uvicorn.Server):
    """The first signal: no more requests, those in progress are completed. The second: ends at once."""

    service: Service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's handler: it raises the signal again after draining, which would be the exit code.
        if self.should_exit:
            self.force_exit = True
        self.service.loop.draining = True
        self.should_exit = True


def h11_with_header_timeout(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, but a connection is closed that has not sent its headers within `seconds`."""

    class TimedH11(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def on_response_complete(self) -> None:
            self._wait()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._late is not None:
                self._late.cancel()
            self._late = self.loop.call_later(seconds, self._too_late)

        def _too_late(self) -> None:
            if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                )
                self.transport.close()

    return TimedH11


def make_server(service: Service, host: str, port: int, drain_seconds: int) -> Server:
    """A server that is not yet started. It ends when its engine fails."""
    config = uvicorn.Config(
        application(service),
        host=host,
        port=port,
        http=h11_with_header_timeout(service.limits.header_seconds),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.limits.max_connections,
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=service.limits.max_header_bytes + 8192,
    )
    server = Server(config)
    server.service = service

    def end_soon() -> None:
        print(f"nanohybrid: the engine has failed: {service.loop.dead!r}", file=sys.stderr, flush=True)
        # After a second, in which the requests in progress are answered with an error.
        asyncio.get_running_loop().call_later(1.0, lambda: setattr(server, "should_exit", True))

    service.loop.on_death = end_soon
    return server


def serve(service: Service, host: str, port: int, drain_seconds: int) -> int:
    """Serve until a signal comes or the engine fails; returns the exit code.

    Raises InputError where the address cannot be used.
    """
    try:
        make_server(service, host, port, drain_seconds).run()
    except SystemExit:  # uvicorn has logged why the address cannot be used
        raise InputError(
            f"{host}:{port} cannot be listened on; is another server there? --port gives another"
        ) from None
    return 1 if service.loop.dead is not None else 0
