"""Permutations by swaps: `swap 31425 13 24` exchanges 1 with 3, then 2 with 4: `31425 13=13425`, `13425
24=13245`.

Harder for a tiny model than the other families (a step copies five digits and changes two): not in the
default mix.
"""

import random

from nanohybrid.tasks.problem import Family

ITEMS = "12345"


class Swaps(Family):
    """`difficulty` swaps of two digits in a row of five."""

    name = "swaps"
    difficulties = range(2, 6)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        row = "".join(rng.sample(ITEMS, len(ITEMS)))
        prompt = [f"swap {row}"]
        steps = []
        for _ in range(difficulty):
            one, other = rng.sample(ITEMS, 2)
            swapped = row.translate({ord(one): other, ord(other): one})
            prompt.append(f"{one}{other}")
            steps.append(f"{row} {one}{other}={swapped}")
            row = swapped
        return " ".join(prompt), steps, row
