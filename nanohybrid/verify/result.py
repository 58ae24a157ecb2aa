"""The result of one check, and how much difference each number format allows."""

from dataclasses import dataclass

import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Relative to the largest logit: the rounding of a deep model's sums when their shapes change (docs/verify.md)."""


@dataclass(frozen=True)
class CheckResult:
    """What was compared, the largest difference found, how much is allowed, and what a model without memory would show.

    difference and memoryless are relative to the largest logit. memoryless is None where the question does not arise; where
    it is below the tolerance, the check passes but could hardly have failed.
    """

    what: str
    on: str
    difference: float
    tolerance: float
    memoryless: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN never is."""
        return self.difference <= self.tolerance

    @property
    def telling(self) -> bool:
        """Whether a model that forgets what came before would have failed."""
        return self.memoryless is None or self.memoryless > self.tolerance
