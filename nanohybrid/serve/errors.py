"""Errors as clients see them, in the format of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error response.

    HTTP status, a message of one line, the field that it is about, a code for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = (
            status,
            message,
            param,
            code,
            headers or {},
        )

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def queue_full(message: str, seconds: int) -> ApiError:
    """The error of a request that should be sent again after `seconds`."""
    return ApiError(429, message, code="queue_full", headers={"retry-after": str(seconds)})


def unexpected(error: Exception) -> ApiError:
    """The error of a bug in the server; the traceback is in its log."""
    return ApiError(500, f"the server failed on this request ({type(error).__name__})")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The most specific of pydantic's errors, with the field's path: messages[0].content."""
    if not errors:
        return ApiError(400, "the request cannot be read")
    # Of the branches of a union, the one that got furthest.
    first = max(errors, key=lambda error: len(error["loc"]))
    param = field(first["loc"])
    message = {"extra_forbidden": "is not a field of this request", "missing": "is missing"}.get(
        first["type"]
    )
    message = message or str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}", param or None)


def field(location: Sequence[Any]) -> str:
    """('body', 'messages', 0, 'role') as messages[0].role, without the names of a union's branches."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "body" and part.isidentifier() and part not in BRANCHES:
            text += f".{part}" if text else part
    return text


BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "NamedTool", "TextPart", "JsonSchema"})
