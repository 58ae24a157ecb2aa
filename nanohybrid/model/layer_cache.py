"""The cache of one layer: its tensors by name, and its buffer of draft tokens that are not yet verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class DraftBuffer(Protocol):
    """A layer's data of draft tokens, until they are accepted or rejected."""

    def commit(self, cache: LayerCache, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Bring the layer's cache forward by the first counts[i] draft tokens of the speculative sequence
        rows[i].

        Sequences that are not named keep the cache from before the drafts.
        """


class LayerCache(dict[str, Tensor]):
    """The tensors of one layer: [slots, ...] for each sequence, [pages, page size, ...] for each token.

    layer: the layer's index. drafts: the buffer of draft tokens that are not committed yet, None where there
    are none. rounded: names of the states that are declared in fp32 and stored in fp16, rounded
    stochastically.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.drafts: DraftBuffer | None = None
        self.rounded: set[str] = set()
