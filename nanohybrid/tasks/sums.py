"""Sums with a running total: `sum 47+8+6` is solved as `47+8=55`, `55+6=61`.

The first number has two digits and the others one, so a step needs one column and at most one carry.
"""

import random

from nanohybrid.tasks.problem import Family


class Sums(Family):
    """`difficulty` numbers; the total stays below 100."""

    name = "sums"
    difficulties = range(3, 7)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        total = 10 + int(rng.random() * 45)
        numbers = [str(total)]
        steps = []
        for _ in range(difficulty - 1):
            addend = 1 + int(rng.random() * 9)
            numbers.append(str(addend))
            steps.append(f"{total}+{addend}={total + addend}")
            total += addend
        return "sum " + "+".join(numbers), steps, str(total)
