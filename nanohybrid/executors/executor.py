"""What an executor is: one call that computes final hidden states and logits of a ragged batch and updates a
cache.

The plain model (model/lm.py) says what is computed; an executor says how. Every executor is held to the plain
model's numbers by `nanohybrid verify` and the tests.

T tokens · E hidden size · V vocabulary · W rows whose logits are wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from nanohybrid.model.cache import HybridCache
from nanohybrid.model.lm import HybridLM
from nanohybrid.ops.layout import Layout


class Executor(ABC):
    """Runs one model over one cache.

    is_batch_invariant: whether what is computed for a token has the same bits whatever shares the batch, and
    however its sequence is cut into calls.
    """

    name: ClassVar[str]
    is_batch_invariant: bool = False

    def __init__(self, model: HybridLM, cache: HybridCache) -> None:
        self.model, self.cache = model, cache

    @abstractmethod
    def run(self, tokens_T: Tensor, layout: Layout, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Final hidden states [T, E], and logits in fp32 [W, V] of the rows `wanted`, which ascend.

        tokens: int64 ids on the model's device. The cache is updated at the layout's slots and pages; draft
        tokens wait for `commit`. Where no row is wanted the logits are an empty tensor.
        """

    def commit(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Accept the first counts[i] draft tokens of the last layout's speculative sequence rows[i]; reject all others."""
        self.cache.commit(rows, counts)
