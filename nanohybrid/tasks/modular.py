"""Arithmetic modulo 10, as the arithmetic families share it.

Only operations that permute the ten digits are drawn (multipliers 3, 7 and 9, no doubling, no zero): whatever came before, every
answer stays equally likely, and no shortcut (anything times 0) gives a chain's end away.
"""

import random

OPERATIONS: tuple[tuple[str, int], ...] = tuple(
    [("+", digit) for digit in range(1, 10)]
    + [("-", digit) for digit in range(1, 10)]
    + [("*", digit) for digit in (3, 7, 9)] * 3
)


def draw_operation(rng: random.Random) -> tuple[str, int]:
    """A sign and a digit; the three signs are equally likely."""
    return OPERATIONS[int(rng.random() * len(OPERATIONS))]


def draw_digit(rng: random.Random) -> int:
    return int(rng.random() * 10)


def apply(left: int, sign: str, right: int) -> int:
    """`left sign right` modulo 10."""
    if sign == "+":
        return (left + right) % 10
    return (left - right) % 10 if sign == "-" else left * right % 10
