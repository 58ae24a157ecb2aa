"""Nested expressions modulo 10, innermost first: `eval 5-(2*(3+4))` is solved as `3+4=7`, `2*7=4`, `5-4=1`.

Each parenthesis has one operation with a digit on the other side, so the next step is always the next
parenthesis outwards.
"""

import random

from nanohybrid.tasks.modular import apply, draw_digit, draw_operation
from nanohybrid.tasks.problem import Family


class Nested(Family):
    """`difficulty` operations; the inner expression is on a random side of each."""

    name = "nested"
    difficulties = range(2, 6)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        value = draw_digit(rng)
        expression = str(value)
        steps = []
        for depth in range(difficulty):
            sign, digit = draw_operation(rng)
            inner = f"({expression})" if depth else expression
            if rng.random() < 0.5:
                expression, step, result = (
                    f"{inner}{sign}{digit}",
                    f"{value}{sign}{digit}",
                    apply(value, sign, digit),
                )
            else:
                expression, step, result = (
                    f"{digit}{sign}{inner}",
                    f"{digit}{sign}{value}",
                    apply(digit, sign, value),
                )
            steps.append(f"{step}={result}")
            value = result
        return f"eval {expression}", steps, str(value)
