"""The budget of a template render, and the operations that can produce large results; each is charged before
it runs.

The budget is a context variable, so renders in other threads have their own.
"""

import json
import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.filters import make_attrgetter
from jinja2.sandbox import SecurityError

LARGEST_ARGUMENT = 100_000
INTEGER_BITS = 4_096


class Budget:
    """Remaining work units and the deadline of a render.

    A unit is a loop step, a list entry or a character.
    """

    def __init__(self, work: int, seconds: float) -> None:
        self.work = work
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def charge(self, amount: int) -> None:
        """Subtract work. Raises SecurityError when the work or the time is used up."""
        self.work -= amount
        if self.work < 0:
            raise SecurityError(
                "it needs too much work: more loop steps, list entries or characters than any chat needs"
            )
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it ran longer than {self.seconds:g} seconds")


current: ContextVar[Budget] = ContextVar("budget of the render in this thread")


def charge(amount: int) -> None:
    """Charge the current render."""
    current.get().charge(amount)


def flatten(value: Any) -> Iterator[Any]:
    """All values inside nested lists and dictionaries, containers included; an entry that occurs twice is
    yielded twice."""
    stack = [value]
    while stack:
        top = stack.pop()
        yield top
        if isinstance(top, Mapping):
            stack.extend(top.keys())
            stack.extend(top.values())
        elif isinstance(top, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
            stack.extend(top)


def charge_text(value: Any) -> None:
    """Charge the characters of `value` as text."""
    if isinstance(value, str):
        charge(len(value) + 1)
        return
    for leaf in flatten(value):
        charge(len(leaf) + 1 if isinstance(leaf, str) else 1)


def charge_result(value: Any) -> Any:
    """Charge the result of an operation, by characters or entries, and return it."""
    if isinstance(value, str):
        charge(len(value) + 1)
    else:
        for _ in flatten(value):
            charge(1)
    return value


def charge_steps(values: Iterable[Any]) -> Iterator[Any]:
    """The values; each is charged as one step."""
    for value in values:
        charge(1)
        yield value


def check_arguments(arguments: Iterable[Any]) -> None:
    """Raise SecurityError for a number above LARGEST_ARGUMENT."""
    for argument in arguments:
        if isinstance(argument, (int, float)) and abs(argument) > LARGEST_ARGUMENT:
            raise SecurityError(f"it passes a number above {LARGEST_ARGUMENT:,}")


# Filters and methods of templates


def replace(value: str, old: str, new: str, count: int = -1) -> str:
    """`str.replace`, charged by the size of the result."""
    value, old, new = str(value), str(old), str(new)
    charge(len(value) + value.count(old) * len(new))
    return value.replace(old, new, -1 if count is None else count)


def join(values: Iterable[Any], between: str = "") -> str:
    """`str.join`, charged by the size of the result."""
    entries = list(charge_steps(values))
    for entry in entries:
        charge_text(entry)
    charge(len(str(between)) * len(entries))
    return str(between).join(map(str, entries))


@jinja2.pass_environment
def join_filter(
    environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    """jinja2's filter `join`; the names of the parameters are jinja2's."""
    return join(values if attribute is None else map(make_attrgetter(environment, attribute), values), d)


def join_method(between: str, values: Iterable[Any]) -> str:
    """The method `join` of a string."""
    return join(values, between)


def charge_format(pattern: str, arguments: Iterable[Any]) -> None:
    """Charge a format string as if each field wrote all arguments, padded to the largest width of its digits.

    Raises SecurityError for widths of five digits or more, and for widths from arguments.
    """
    if re.search(r"\d{5,}|\*|\{[^}]*\{", pattern):
        raise SecurityError("it pads a text by a width that is too large or computed")
    before = current.get().work
    for argument in arguments:
        charge_text(argument)
    fields = pattern.count("%") + pattern.count("{")
    padding = 10_000 if re.search(r"\d{3,}", pattern) else 100
    charge(len(pattern) + fields * (before - current.get().work + padding))


def format_text(value: str, *arguments: Any, **named: Any) -> str:
    """jinja2's filter `format`."""
    charge_format(str(value), [*arguments, *named.values()])
    return str(value) % (named or arguments)


def indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """jinja2's filter `indent`."""
    margin = width if isinstance(width, str) else " " * width
    lines = (str(value) + ("\n" if blank else "")).splitlines(keepends=True)
    charge(len(str(value)) + len(lines) * (len(margin) + 1))
    return "".join(
        line if (not first and index == 0) or not (blank or line.strip()) else margin + line
        for index, line in enumerate(lines)
    )


def to_string(value: Any) -> str:
    """jinja2's filter `string`."""
    charge_text(value)
    return str(value)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers. Raises SecurityError for an indent above 16."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("it indents JSON by more than 16")
    charge_text(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def concatenate(values: Sequence[Any]) -> str:
    """The operator `~`."""
    return join(values)


def charge_product(operator: str, left: Any, right: Any) -> None:
    """Charge `*` and `**`. Raises SecurityError for integers of more than INTEGER_BITS bits."""
    for value, other in ((left, right), (right, left)):
        if not isinstance(value, (int, float)) and isinstance(other, int):
            check_arguments([other])
            charge((len(value) if isinstance(value, str) else sum(1 for _ in flatten(value))) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        )
        if bits > INTEGER_BITS:
            raise SecurityError(f"it computes a number of more than {INTEGER_BITS} bits")
