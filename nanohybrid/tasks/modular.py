"""Arithmetic modulo 10, shared by the arithmetic families.

All operations are permutations of the ten digits (multipliers 3, 7 and 9; no 0 and no even number). So all
answers are equally likely after any number of steps, and no shortcut (such as times 0) reveals the result of
a chain.
"""

import random

OPERATIONS: tuple[tuple[str, int], ...] = tuple(
    [("+", digit) for digit in range(1, 10)]
    + [("-", digit) for digit in range(1, 10)]
    + [("*", digit) for digit in (3, 7, 9)] * 3
)


def draw_operation(rng: random.Random) -> tuple[str, int]:
    """A random sign and digit; the three signs are equally likely."""
    return OPERATIONS[int(rng.random() * len(OPERATIONS))]


def draw_digit(rng: random.Random) -> int:
    """A random digit."""
    return int(rng.random() * 10)


def apply(left: int, sign: str, right: int) -> int:
    """`left sign right` modulo 10."""
    if sign == "+":
        return (left + right) % 10
    return (left - right) % 10 if sign == "-" else left * right % 10
