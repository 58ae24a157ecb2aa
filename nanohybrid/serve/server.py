"""Running it: uvicorn in one process, a drain on SIGTERM, and an exit code that tells a dead engine from a good end."""

import asyncio
import sys
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanohybrid.errors import InputError
from nanohybrid.serve.app import application
from nanohybrid.serve.service import Service


class Server(uvicorn.Server):
    """The first signal stops taking requests and waits for those under way, the second ends at once."""

    service: Service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # not uvicorn's: that would raise the signal again after the drain, and the exit code would be the signal's
        if self.should_exit:
            self.force_exit = True
        self.service.loop.draining = True
        self.should_exit = True


def patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP, but a connection whose next request has not brought all its headers after so many seconds is closed."""

    class Patient(H11Protocol):
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

    return Patient


def made(service: Service, host: str, port: int, drain_seconds: int) -> Server:
    """A server, not yet started, that ends when its engine dies."""
    config = uvicorn.Config(
        application(service),
        host=host,
        port=port,
        http=patient(service.limits.header_seconds),
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
        asyncio.get_running_loop().call_later(
            1.0, lambda: setattr(server, "should_exit", True)
        )  # those in flight hear of it

    service.loop.on_death = end_soon
    return server


def serve(service: Service, host: str, port: int, drain_seconds: int) -> int:
    """Serve until a signal comes or the engine dies; returns the exit code."""
    try:
        made(service, host, port, drain_seconds).run()
    except SystemExit:  # the address cannot be had; uvicorn has said why
        raise InputError(
            f"{host}:{port} cannot be listened on; is another server there? --port gives another"
        ) from None
    return 1 if service.loop.dead is not None else 0
