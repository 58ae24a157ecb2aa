"""JSON without Python's liberties: what is read can be written again as JSON that every program reads.

Python's own `json` takes NaN and infinities, reads 1e400 as infinity, and reads halves of surrogate pairs,
which no UTF-8 holds."""

import json
import math
import re
from typing import Any, NoReturn

SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class SurrogateError(ValueError):
    """A text with half a surrogate pair."""


def loads(text: str) -> Any:
    """The value of a JSON text. Raises SurrogateError, and ValueError or RecursionError where the text is no
    JSON otherwise.
    """
    value = json.loads(text, parse_constant=refuse_constant, parse_float=finite)
    if ESCAPED_SURROGATE.search(text) or SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SurrogateError("half of a surrogate pair, which no text can hold") from None
    return value


def finite(text: str) -> float:
    """The number of a JSON literal. Raises ValueError where float64 cannot hold it."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def refuse_constant(name: str) -> NoReturn:
    """Raises ValueError for NaN, Infinity or -Infinity."""
    raise ValueError(f"{name} is not a number of JSON")
