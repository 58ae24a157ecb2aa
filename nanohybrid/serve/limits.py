"""Limits of a request. Every field is a flag of `nanohybrid serve`; what exceeds it is refused with its name.

Limits of the body apply before a byte of it is parsed, the others before template, tokenizer or engine see
it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nanohybrid.serve.errors import ApiError


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """Sizes and times. The help text of each field is that of its flag."""

    max_body_bytes: int = _limit(4 << 20, "bytes of a request's body")
    max_header_bytes: int = _limit(32 << 10, "bytes of a request's line and headers together")
    max_headers: int = _limit(100, "headers of a request")
    max_json_depth: int = _limit(100, "nesting depth of a body")
    max_messages: int = _limit(1024, "messages of a conversation")
    max_tools: int = _limit(128, "tools of a request")
    max_schema_bytes: int = _limit(64 << 10, "bytes of one JSON schema")
    max_schema_depth: int = _limit(32, "nesting depth of a JSON schema")
    max_regex_bytes: int = _limit(2048, "bytes of a regular expression, or of all choices")
    max_regex_repeats: int = _limit(
        20_000, "product of the repeat counts of a regular expression, in a schema too"
    )
    max_stops: int = _limit(16, "stop strings of a request")
    max_stop_bytes: int = _limit(256, "bytes of one stop string")
    max_logit_bias: int = _limit(1024, "entries of logit_bias")
    max_n: int = _limit(8, "completions of a prompt (n)")
    max_prompts: int = _limit(128, "prompts of a request, times n")
    max_logprobs: int = _limit(20, "alternatives shown for each token")
    max_connections: int = _limit(1024, "open connections, idle ones included")
    header_seconds: float = _limit(20.0, "seconds that a request's headers may take to arrive")
    body_seconds: float = _limit(30.0, "seconds that a body may take to arrive")
    prepare_seconds: float = _limit(15.0, "seconds that template, tokenizer and grammar may take")
    queue_seconds: float = _limit(120.0, "seconds that a request may wait for a slot before it gets 429")
    step_seconds: float = _limit(300.0, "seconds that a step of the engine may take before /health is 503")
    request_seconds: float = _limit(1800.0, "seconds that a request may take in all")

    def count(self, size: int, limit: str, param: str, thing: str) -> None:
        """Raise ApiError 400 where `size` exceeds the field named `limit`."""
        most = getattr(self, limit)
        if size > most:
            raise ApiError(
                400,
                f"{param} has {size:,} {thing}; at most {most:,} are allowed (--{limit.replace('_', '-')})",
                param,
            )

    def schema(self, schema: Any, param: str) -> None:
        """Raise ApiError 400 for a JSON schema that is too large or too deep, or has an unknown reference."""
        size = 0
        for value, depth in _walk(schema):
            size += len(value.encode("utf-8", "replace")) + 3 if isinstance(value, str) else 2
            # A level of a schema is two of JSON: `properties` and a name.
            if depth > self.max_schema_depth * 2:
                raise ApiError(
                    400,
                    f"{param} nests deeper than {self.max_schema_depth} levels (--max-schema-depth)",
                    param,
                )
            if size > self.max_schema_bytes:
                raise ApiError(
                    400, f"{param} is larger than {self.max_schema_bytes:,} bytes (--max-schema-bytes)", param
                )
            if isinstance(value, dict) and isinstance(value.get("$ref"), str):
                _resolve(schema, value["$ref"], param)
            if isinstance(value, dict) and isinstance(value.get("pattern"), str):
                self.regex(value["pattern"], param)

    def regex(self, pattern: str, param: str) -> None:
        """Raise ApiError 400 for a regular expression that is too large or has too many repeats.

        If the repeats are nested, the automaton has as many states as their product. A million states take
        seconds of a step, in which other requests wait.
        """
        self.count(len(pattern.encode("utf-8", "replace")), "max_regex_bytes", param, "bytes")
        repeats = 1
        for found in _COUNTS.finditer(pattern):
            repeats = (
                min(repeats * max(int(number[:9]) if number else 1 for number in found.groups()), 1 << 62)
                or 1
            )
        self.count(repeats, "max_regex_repeats", param, "repeats")


_COUNTS = re.compile(r"\{\s*([0-9]+)\s*,?\s*([0-9]*)\s*\}")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def json_depth(body: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest no deeper than `limit`, in linear time and without parsing."""
    depth = 0
    for found in _TOKEN.finditer(body):
        if found[0] in b"[{":
            depth += 1
            if depth > limit:
                return False
        elif found[0] in b"]}":
            depth -= 1
    return True


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    stack = [(value, 0)]
    while stack:
        top, depth = stack.pop()
        yield top, depth
        if isinstance(top, dict):
            stack += [(key, depth) for key in top]
            stack += [(inner, depth + 1) for inner in top.values()]
        elif isinstance(top, list):
            stack += [(inner, depth + 1) for inner in top]


def _resolve(schema: Any, reference: str, param: str) -> None:
    if not reference.startswith("#"):
        raise ApiError(
            400,
            f"{param} refers to {reference!r}; only references inside the schema (#/...) are followed",
            param,
        )
    at = schema
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(at, dict) or part not in at:
            raise ApiError(400, f"{param} refers to {reference!r}, which is not in it", param)
        at = at[part]
