"""What a client did wrong, or what went wrong for it, in the shape that OpenAI's clients expect."""

from collections.abc import Sequence
from typing import Any

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is an error: its status, its one line, the field it is about and a code for machines."""

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


def busy(message: str, seconds: int) -> ApiError:
    """Come again in so many seconds."""
    return ApiError(429, message, code="queue_full", headers={"retry-after": str(seconds)})


def unexpected(error: Exception) -> ApiError:
    """A bug of the server's own; the traceback is in the log."""
    return ApiError(500, f"the server failed on this request ({type(error).__name__})")


def unread(errors: Sequence[Any]) -> ApiError:
    """The first complaint of pydantic, about the field as a person would write it: messages[0].content."""
    if not errors:
        return ApiError(400, "the request cannot be read")
    first = max(
        errors, key=lambda error: len(error["loc"])
    )  # of a union's complaints the one that got furthest
    param = field(first["loc"])
    message = {"extra_forbidden": "is not a field of this request", "missing": "is missing"}.get(
        first["type"]
    )
    message = message or str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}", param or None)


def field(location: Sequence[Any]) -> str:
    """('body', 'messages', 0, 'role') as messages[0].role; the names of a union's branches are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "body" and part.isidentifier() and part not in BRANCHES:
            text += f".{part}" if text else part
    return text


BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "NamedTool", "TextPart", "JsonSchema"})
