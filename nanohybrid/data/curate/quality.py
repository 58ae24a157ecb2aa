"""A handful of named heuristics; a document that one of them catches is dropped and counted under its name.

They are Gopher's and C4's in spirit, with limits that leave ordinary code alone.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

LICENSE = re.compile(
    r"permission is hereby granted|redistribution and use in source and binary forms|licensed under the apache license"
    r"|without warranty of any kind|under the terms of the gnu|all rights reserved",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class QualityLimits:
    """Limits beyond which a document is dropped."""

    shortest: int = 120
    """Characters that a document needs."""
    longest_line: int = 500
    """Characters of the longest line (data and minified code have longer ones)."""
    symbols: float = 0.35
    """Share of the characters that are neither letters, digits nor spaces."""
    letters: float = 0.55
    """Share of the visible characters that must be letters."""
    digits: float = 0.15
    """Share of the visible characters that may be digits."""
    repeated_lines: float = 0.3
    """Share of the lines (of ten characters or more) that came before in the same document."""


def too_short(text: str, limits: QualityLimits) -> bool:
    return len(text.strip()) < limits.shortest


def long_lines(text: str, limits: QualityLimits) -> bool:
    return max(map(len, text.splitlines()), default=0) > limits.longest_line


def broken_characters(text: str, limits: QualityLimits) -> bool:
    return "\ufffd" in text or "\x00" in text


def too_many_symbols(text: str, limits: QualityLimits) -> bool:
    symbols = sum(not (character.isalnum() or character.isspace()) for character in text)
    return symbols > limits.symbols * len(text)


def too_few_letters(text: str, limits: QualityLimits) -> bool:
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) < limits.letters * len(visible)


def too_many_digits(text: str, limits: QualityLimits) -> bool:
    visible = "".join(text.split())
    return sum(map(str.isdigit, visible)) > limits.digits * len(visible)


def repeated_lines(text: str, limits: QualityLimits) -> bool:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 10]
    return len(lines) - len(Counter(lines)) > limits.repeated_lines * len(lines)


def license(text: str, limits: QualityLimits) -> bool:
    return LICENSE.search(text) is not None


HEURISTICS: dict[str, Callable[[str, QualityLimits], bool]] = {
    "too short": too_short,
    "long lines": long_lines,
    "broken characters": broken_characters,
    "too many symbols": too_many_symbols,
    "too few letters": too_few_letters,
    "too many digits": too_many_digits,
    "repeated lines": repeated_lines,
    "license": license,
}


def fault(text: str, limits: QualityLimits) -> str | None:
    """The name of the first heuristic that catches a text, or None."""
    return next((name for name, catches in HEURISTICS.items() if catches(text, limits)), None)
