"""Chained assignments modulo 10: `b=3;e=b+4;a=e*7;a?` is solved as `b=3`, `e=3+4=7`, `a=7*7=9`.

A step takes one statement of the prompt, replaces the variable by the value of the previous step, and
evaluates it.
"""

import random
from itertools import pairwise

from nanohybrid.tasks.modular import apply, draw_digit, draw_operation
from nanohybrid.tasks.problem import Family

LETTERS = "abcdefgh"


class Assignments(Family):
    """`difficulty` statements; each after the first uses the previous variable."""

    name = "assignments"
    difficulties = range(2, 7)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        names = rng.sample(LETTERS, difficulty)
        value = draw_digit(rng)
        statements = [f"{names[0]}={value}"]
        steps = [statements[0]]
        for read, made in pairwise(names):
            sign, digit = draw_operation(rng)
            result = apply(value, sign, digit)
            statements.append(f"{made}={read}{sign}{digit}")
            steps.append(f"{made}={value}{sign}{digit}={result}")
            value = result
        return ";".join(statements) + f";{names[-1]}?", steps, str(value)
