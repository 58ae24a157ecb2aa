"""Checks before every route: size of headers, API key, origin, size and format of the body, in this order.

Plain ASGI, so that nothing is parsed before. Only /health and /ready need no key.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanohybrid import strict_json
from nanohybrid.serve.errors import ApiError
from nanohybrid.serve.limits import Limits, json_depth

OPEN = frozenset({"/health", "/ready"})
PAGES = frozenset({"/", "/docs"})
DISCARDED = 64 << 20
"""So many bytes of a body that is too large are read and dropped, so that the client gets the answer."""


class ApiKeys:
    """API keys, stored as hashes and compared in constant time."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, authorization: str) -> str | None:
        """A name for the key in the header, or None where it is not a key of this server.

        The header is `Bearer KEY`, or what a browser sends: `Basic`, with the key as the password.
        """
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = (
                    base64.b64decode(value.strip(), validate=True)
                    .decode("utf-8", "replace")
                    .partition(":")[2]
                )
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != "bearer":
            return None
        given = hashlib.sha256(value.strip().encode("utf-8", "replace")).digest()
        # Compared with all keys, without an early end.
        matches = sum(hmac.compare_digest(given, known) for known in self._hashes)
        return given.hex()[:16] if matches else None


class RequestGuard:
    """The middleware. refused: called with the status of each request that is refused here."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: ApiKeys,
        refused: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.app, self.limits, self.keys, self.refused = app, limits, keys, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            self.refused(error.status)
            await answer(send, error)
            return
        await self.app(scope, receive if body is None else _replay(body, receive), send)

    def _check_headers(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > self.limits.max_headers:
            raise ApiError(
                431, f"{len(headers)} headers; at most {self.limits.max_headers} are allowed (--max-headers)"
            )
        size = (
            len(scope["raw_path"] or b"")
            + len(scope["query_string"])
            + sum(len(name) + len(value) + 4 for name, value in headers)
        )
        if size > self.limits.max_header_bytes:
            raise ApiError(
                431,
                f"headers of {size:,} bytes; at most {self.limits.max_header_bytes:,} are allowed "
                "(--max-header-bytes)",
            )
        key = self.keys.allow(_header(scope, b"authorization")) if self.keys else ""
        scope["nanohybrid.key"] = key
        if key is None and scope["path"] not in OPEN:
            # With "Basic", a browser that opens the page asks for the key.
            scheme = "Basic" if scope["path"] in PAGES else "Bearer"
            challenge = {"www-authenticate": f'{scheme} realm="nanohybrid"'}
            raise ApiError(
                401,
                "this server needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=challenge,
            )
        origin = _header(scope, b"origin")
        if origin and urlsplit(origin).netloc != _header(scope, b"host"):
            raise ApiError(403, f"a page of {origin[:100]} may not use this server", code="cross_origin")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, which is JSON that can be parsed safely; None where the method has no body."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self.limits.max_body_bytes:
            await self._too_large(receive)
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._read(receive)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.limits.body_seconds:g} seconds"
            ) from None
        if _header(scope, b"content-type").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be application/json", "content-type")
        if len(body) > 1 << 16:
            await asyncio.get_running_loop().run_in_executor(
                None, check_json, body, self.limits.max_json_depth
            )
        else:
            check_json(body, self.limits.max_json_depth)
        return body

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ApiError(400, "the client left before its body was complete")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.max_body_bytes:
                parts.clear()
                await self._too_large(receive, size, message.get("more_body", False))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _too_large(self, receive: Receive, size: int = 0, more: bool = True) -> NoReturn:
        while more and size < DISCARDED:
            try:
                message = await asyncio.wait_for(receive(), 5)
            except TimeoutError:
                break
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
        raise ApiError(
            413, f"the body is larger than {self.limits.max_body_bytes:,} bytes (--max-body-bytes)"
        )


def check_json(body: bytes, depth: int) -> None:
    """Raise ApiError 400 for a body that is not a JSON object in UTF-8 or that nests too deep.

    Also for what JSON does not have: NaN, infinities, numbers that overflow, halves of surrogate pairs.
        Whatever passes can be written as JSON again, wherever it may come back in an answer.
    """
    if not json_depth(body, depth):
        raise ApiError(400, f"the body nests deeper than {depth} levels (--max-json-depth)")
    try:
        value = strict_json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except strict_json.SurrogateError as error:
        raise ApiError(400, f"the body has {error}") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")


async def answer(send: Send, error: ApiError) -> None:
    """Send an error, and close the connection where the body was not read to its end."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    if error.status in (408, 413):
        headers["connection"] = "close"
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return next((bytes(value).decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body that was read, then what follows."""
    given: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return given.pop() if given else await receive()

    return replay
