"""The result of one check, and how much difference each number format allows."""

from dataclasses import dataclass

import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Relative to the largest logit: the rounding of a deep model's sums when their shapes change (docs/verify.md)."""


@dataclass(frozen=True)
class CheckResult:
    """One check: its name, its input, the largest difference, the tolerance, and the memoryless baseline.

    difference and memoryless are relative to the largest logit. memoryless is the difference of a model
    without context, or None if it does not apply. If it is below the tolerance, the check passes but could
    hardly have failed.
    """

    what: str
    on: str
    difference: float
    tolerance: float
    memoryless: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance. NaN is not."""
        return self.difference <= self.tolerance

    @property
    def telling(self) -> bool:
        """Whether a memoryless model would have failed this check."""
        return self.memoryless is None or self.memoryless > self.tolerance
