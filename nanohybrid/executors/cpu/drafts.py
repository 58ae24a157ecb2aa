"""Draft tokens of the CPU executor: their inputs in each Mamba-2 layer, buffered until they are verified."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.model.cache import HybridCache
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.ops.layout import Layout


class Advances(Protocol):
    """The executor, as far as a draft buffer needs it."""

    config: HybridConfig

    def advance(self, drafts: CpuDrafts, sequences: Sequence[int], counts: Sequence[int]) -> None: ...

    @property
    def recurrent_layers(self) -> int: ...


class CpuDrafts:
    """The speculative sequences of one layout, whose draft tokens wait to be accepted or rejected.

    inputs: fp32 [Mamba-2 layers, draft tokens, columns of in_proj]. first_rows: by sequence, the row of its
    first token.
    """

    def __init__(self, executor: Advances, cache: HybridCache, layout: Layout) -> None:
        if layout.slots is None:
            raise ValueError("draft tokens need a layout with slots")
        self.executor, self.layout = executor, layout
        self.first_rows: dict[int, int] = {}
        count = 0
        for sequence in layout.speculative:
            self.first_rows[sequence] = count
            count += layout.lengths[sequence]
        config = executor.config
        columns = config.mamba_inner_size + config.recurrence_inputs
        self.inputs = torch.empty(executor.recurrent_layers, count, columns)
        self._slots = [layout.slots[sequence] for sequence in layout.speculative]
        self._before = [pool[self._slots] for pool in cache.slot_pools]

    def places(self, parts: Iterable[tuple[int, int, int]]) -> list[int]:
        """For each row of a call, its row in `inputs`; -1 for a token that is no draft's."""
        places: list[int] = []
        for sequence, offset, length in parts:
            first = self.first_rows.get(sequence)
            places += [-1] * length if first is None else range(first + offset, first + offset + length)
        return places

    def roll_back(self, cache: HybridCache) -> None:
        """Restore the states from before the drafts, and leave this buffer in the cache for `commit`."""
        for pool, before in zip(cache.slot_pools, self._before, strict=True):
            pool[self._slots] = before
        cache.layers[0].drafts = self

    def commit(self, cache: LayerCache, rows: Sequence[int], counts: Sequence[int]) -> None:
        """As DraftBuffer.commit, for all layers at once."""
        self.executor.advance(self, [self.layout.speculative[row] for row in rows], counts)
