"""Confidence intervals of proportions."""

import math

Z95 = 1.959963984540054  # standard deviations; 95 % of a normal distribution lies within


def wilson(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a proportion (Wilson 1927); (0, 1) without trials.

    It is valid for few trials and near 0 and 1, where p +- z sqrt(p (1 - p) / n) is not.
    """
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))
