"""Initial and final states of a batch's sequences, between a layer's cache and the recurrence that uses them.

S sequences.
"""

from __future__ import annotations

from torch import Tensor

from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.mixers.stochastic_rounding import Rounding
from nanohybrid.ops.layout import Layout


class RecurrentStates:
    """Reads the states of a layout's sequences as [S, ...] and stores them back in place.

    Sequences in consecutive slots are read as a view, so that a decode step updates the cache itself. States
    stored in fp16 are read as fp32 and rounded stochastically when they are stored.
    """

    def __init__(self, cache: LayerCache | None, layout: Layout) -> None:
        self._cache, self._layout, self._run = cache, layout, layout.contiguous_slots

    def initial(self, name: str) -> Tensor | None:
        """[S, ...] with zeros for the sequences that begin here; None where all do."""
        if self._cache is None or not self._layout.continues:
            return None
        pool = self._cache[name]
        rows = (
            pool[self._run]
            if self._run is not None
            else pool.index_select(0, self._layout.slot_index(pool.device))
        )
        if len(self._layout.continues) < self._layout.sequences:
            fresh = self._layout.fresh_mask(pool.device).view(-1, *[1] * (rows.ndim - 1))
            rows = rows.masked_fill(fresh, 0)
        return rows.float() if name in self._cache.rounded else rows

    def initial_or_zeros(self, name: str) -> Tensor:
        """As `initial`, with zeros in place of None. Raises ValueError where there is no cache."""
        if self._cache is None:
            raise ValueError("states are read from a cache, and there is none")
        rows = self.initial(name)
        if rows is None:
            pool = self._cache[name]
            rows = pool.new_zeros(self._layout.sequences, *pool.shape[1:])
        return rows.float() if name in self._cache.rounded else rows

    def store(self, name: str, rows: Tensor | None) -> None:
        """Store [S, ...] at the slots.

        In training, or where `rows` is the cache's own memory, there is nothing to do.
        """
        if self._cache is None or rows is None:
            return
        pool = self._cache[name]
        if name in self._cache.rounded:
            rows = Rounding.of(self._layout, self._cache.layer, rows.device).after(rows, -1)
        if self._run is None:
            pool.index_copy_(0, self._layout.slot_index(pool.device), rows.to(pool.dtype))
        elif rows.data_ptr() != pool[self._run].data_ptr():
            pool[self._run].copy_(rows)
