"""What one render of a template may spend, and the operations that make much out of little, each paying before it does so.

The budget belongs to the render that runs in this thread (a context variable), so renders in other threads have their own.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.filters import make_attrgetter
from jinja2.sandbox import SecurityError

LARGEST_ARGUMENT = 100_000
INTEGER_BITS = 4_096


class Budget:
    """What one render may still spend."""

    def __init__(self, work: int, seconds: float) -> None:
        self.work = work
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def pay(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise SecurityError(
                "it makes too much: more loop steps, list entries or characters than any chat needs"
            )
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it ran longer than {self.seconds:g} seconds")


current: ContextVar[Budget] = ContextVar("budget of the render in this thread")


def pay(amount: int) -> None:
    current.get().pay(amount)


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested lists and dictionaries, one by one; an entry that occurs twice comes twice."""
    stack = [value]
    while stack:
        top = stack.pop()
        yield top
        if isinstance(top, Mapping):
            stack.extend(top.keys())
            stack.extend(top.values())
        elif isinstance(top, (list, tuple, set, frozenset)):
            stack.extend(top)


def pay_as_text(value: Any) -> None:
    """Pay for all the characters that writing `value` out makes."""
    if isinstance(value, str):
        pay(len(value) + 1)
        return
    for leaf in leaves(value):
        pay(len(leaf) + 1 if isinstance(leaf, str) else 1)


def made(value: Any) -> Any:
    """Pay for a value that an operation made: its characters if it is a text, its entries if it holds others."""
    if isinstance(value, str):
        pay(len(value) + 1)
    else:
        for _ in leaves(value):
            pay(1)
    return value


def steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        pay(1)
        yield value


def check_arguments(arguments: Iterable[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, (int, float)) and abs(argument) > LARGEST_ARGUMENT:
            raise SecurityError(f"it passes a number above {LARGEST_ARGUMENT:,}")


# The operations


def replaced(value: str, old: str, new: str, count: int = -1) -> str:
    value, old, new = str(value), str(old), str(new)
    pay(len(value) + value.count(old) * len(new))
    return value.replace(old, new, -1 if count is None else count)


def joined(values: Iterable[Any], between: str = "") -> str:
    entries = list(steps(values))
    for entry in entries:
        pay_as_text(entry)
    pay(len(str(between)) * len(entries))
    return str(between).join(map(str, entries))


@jinja2.pass_environment
def join_filter(
    environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    return joined(values if attribute is None else map(make_attrgetter(environment, attribute), values), d)


def join_method(between: str, values: Iterable[Any]) -> str:
    return joined(values, between)


def pay_for_format(pattern: str, arguments: Iterable[Any]) -> None:
    """Pay as if every field wrote every argument, and padded it to the largest width that four digits can say."""
    if re.search(r"\d{5,}|\*|\{[^}]*\{", pattern):
        raise SecurityError("it pads a text by a width that is too large or computed")
    before = current.get().work
    for argument in arguments:
        pay_as_text(argument)
    fields = pattern.count("%") + pattern.count("{")
    padding = 10_000 if re.search(r"\d{3,}", pattern) else 100
    pay(len(pattern) + fields * (before - current.get().work + padding))


def formatted(value: str, *arguments: Any, **named: Any) -> str:
    pay_for_format(str(value), [*arguments, *named.values()])
    return str(value) % (named or arguments)


def indented(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * width
    lines = (str(value) + ("\n" if blank else "")).splitlines(keepends=True)
    pay(len(str(value)) + len(lines) * (len(margin) + 1))
    return "".join(
        line if (not first and index == 0) or not (blank or line.strip()) else margin + line
        for index, line in enumerate(lines)
    )


def to_string(value: Any) -> str:
    pay_as_text(value)
    return str(value)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("it indents JSON by more than 16")
    pay_as_text(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def concatenated(values: Sequence[Any]) -> str:
    return joined(values)


def pay_for_product(operator: str, left: Any, right: Any) -> None:
    for value, other in ((left, right), (right, left)):
        if not isinstance(value, (int, float)) and isinstance(other, int):
            check_arguments([other])
            pay((len(value) if isinstance(value, str) else sum(1 for _ in leaves(value))) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        )
        if bits > INTEGER_BITS:
            raise SecurityError(f"it computes a number of more than {INTEGER_BITS} bits")
