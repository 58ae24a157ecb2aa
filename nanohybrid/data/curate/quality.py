"""Quality heuristics in the manner of Gopher and C4 (Rae et al. 2021, Raffel et al. 2020), with limits that
pass ordinary code.

A document that fails one is dropped and counted under the name of the heuristic.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

LICENSE = re.compile(
    r"permission is hereby granted|redistribution and use in source and binary forms|licensed under the "
    r"apache license"
    r"|without warranty of any kind|under the terms of the gnu|all rights reserved",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class QualityLimits:
    """Quality filter: limits beyond which a document is dropped."""

    RENAMED: ClassVar[dict[str, str]] = {
        "shortest": "min_characters",
        "longest_line": "max_line_length",
        "symbols": "max_symbol_ratio",
        "letters": "min_letter_ratio",
        "digits": "max_digit_ratio",
        "repeated_lines": "max_repeated_line_ratio",
    }

    min_characters: int = 120
    """Characters of a document, at least."""
    max_line_length: int = 500
    """Characters of a line, at most; data and minified code have longer ones."""
    max_symbol_ratio: float = 0.35
    """Share of the characters that are neither letters, digits nor spaces, at most."""
    min_letter_ratio: float = 0.55
    """Share of letters among the visible characters, at least."""
    max_digit_ratio: float = 0.15
    """Share of digits among the visible characters, at most."""
    max_repeated_line_ratio: float = 0.3
    """Share of lines (of ten characters or more) that occur earlier in the document, at most."""


def too_short(text: str, limits: QualityLimits) -> bool:
    return len(text.strip()) < limits.min_characters


def long_lines(text: str, limits: QualityLimits) -> bool:
    return max(map(len, text.splitlines()), default=0) > limits.max_line_length


def broken_characters(text: str, limits: QualityLimits) -> bool:
    return "\ufffd" in text or "\x00" in text


def too_many_symbols(text: str, limits: QualityLimits) -> bool:
    symbols = sum(not (character.isalnum() or character.isspace()) for character in text)
    return symbols > limits.max_symbol_ratio * len(text)


def too_few_letters(text: str, limits: QualityLimits) -> bool:
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) < limits.min_letter_ratio * len(visible)


def too_many_digits(text: str, limits: QualityLimits) -> bool:
    visible = "".join(text.split())
    return sum(map(str.isdigit, visible)) > limits.max_digit_ratio * len(visible)


def repeated_lines(text: str, limits: QualityLimits) -> bool:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 10]
    return len(lines) - len(Counter(lines)) > limits.max_repeated_line_ratio * len(lines)


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


def failed_heuristic(text: str, limits: QualityLimits) -> str | None:
    """The name of the first heuristic that a text fails, or None."""
    return next((name for name, fails in HEURISTICS.items() if fails(text, limits)), None)
