"""Running expressions, left to right modulo 10: `run 7*3-7+5` is solved as `7*3=1`, `1-7=4`, `4+5=9`."""

import random

from nanohybrid.tasks.modular import apply, draw_digit, draw_operation
from nanohybrid.tasks.problem import Family


class Running(Family):
    """`difficulty` operations, each on the result of the previous one."""

    name = "running"
    difficulties = range(2, 7)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        value = draw_digit(rng)
        expression = [str(value)]
        steps = []
        for _ in range(difficulty):
            sign, digit = draw_operation(rng)
            result = apply(value, sign, digit)
            expression.append(f"{sign}{digit}")
            steps.append(f"{value}{sign}{digit}={result}")
            value = result
        return "run " + "".join(expression), steps, str(value)
