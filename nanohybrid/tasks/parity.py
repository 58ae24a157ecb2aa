"""Parity of bits: `parity 1101` is solved as `1+1=0`, `0+0=0`, `0+1=1`; the answer is 1 for an odd number of
ones."""

import random

from nanohybrid.tasks.problem import Family


class Parity(Family):
    """`difficulty` bits. Guessing has an accuracy of 0.5."""

    name = "parity"
    difficulties = range(4, 13)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        bits = format(rng.getrandbits(difficulty), f"0{difficulty}b")
        value = int(bits[0])
        steps = []
        for bit in bits[1:]:
            result = value ^ int(bit)
            steps.append(f"{value}+{bit}={result}")
            value = result
        return f"parity {bits}", steps, str(value)
