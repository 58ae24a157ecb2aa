"""The result of one proof, and how much difference each number format allows."""

from dataclasses import dataclass

import torch

# relative to the largest logit; rounding of a deep model's sums when their shapes change, with room to spare (docs/verify.md)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Line:
    """What was compared, the largest difference found, how much is allowed, and what a model that forgets would show.

    difference and forgetful are relative to the largest logit. forgetful is None where the question does not arise; where it
    is below the tolerance, the proof passes but could hardly have failed.
    """

    what: str
    on: str
    difference: float
    tolerance: float
    forgetful: float | None = None

    @property
    def passed(self) -> bool:
        """Not-a-number never passes."""
        return self.difference <= self.tolerance

    @property
    def telling(self) -> bool:
        """Whether a model that forgets what came before would have failed."""
        return self.forgetful is None or self.forgetful > self.tolerance
