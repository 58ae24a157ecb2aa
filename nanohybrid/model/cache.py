"""The cache of a model: for each layer, the tensors that its mixer declares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.spec import cache_specs
from nanohybrid.ops.sizes import PAGE


@dataclass(frozen=True, eq=False)
class OffloadedCache:
    """An immutable copy of one sequence's cache in host memory: the rows of its slot, and each of its pages."""

    rows: list[Tensor]
    pages: tuple[list[Tensor], ...]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Identity and bytes of each block of memory in it: copies that share a page name the same block."""
        return [(id(block), sum(tensor.nbytes for tensor in block)) for block in (self.rows, *self.pages)]


@dataclass(frozen=True, eq=False)
class HybridCache:
    """Recurrent states and KV cache of many sequences.

    layers[i] maps a name to a tensor: [slots, ...] for what a sequence keeps, [pages, page size, ...] for
    what a token keeps. An executor reads and writes them in place, by the layout's slots and pages. A
    sequence that begins reads zeros whatever its slot holds.
    """

    layers: list[LayerCache]
    slots: int
    pages: int
    page_size: int
    slot_pools: list[Tensor]
    page_pools: list[Tensor]
    _executor: list[str] = field(default_factory=list)

    @classmethod
    def allocate(
        cls,
        config: HybridConfig,
        slots: int,
        pages: int,
        page_size: int = PAGE,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        state_dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> HybridCache:
        """Zeroed tensors.

        dtype: of the activations. Recurrent states are fp32 (float64 for float64) and KV rows in `dtype`,
        unless `state_dtype` and `kv_dtype` say otherwise (model/spec.py).
        """
        layers: list[LayerCache] = []
        slot_pools: list[Tensor] = []
        page_pools: list[Tensor] = []
        for index, stored in enumerate(cache_specs(config, dtype, state_dtype, kv_dtype)):
            layer = LayerCache(index)
            for name, one in stored.items():
                rows = (pages, page_size) if one.per_token else (slots,)
                if one.rounded:
                    layer.rounded.add(name)
                layer[name] = torch.zeros(*rows, *one.shape, dtype=one.dtype, device=device)
                (page_pools if one.per_token else slot_pools).append(layer[name])
            layers.append(layer)
        return cls(layers, slots, pages, page_size, slot_pools, page_pools)

    @classmethod
    def for_context(
        cls,
        config: HybridConfig,
        sequences: int,
        context: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> HybridCache:
        """A cache for `sequences` of up to `context` tokens, for Layout.contiguous(..., context)."""
        return cls.allocate(config, sequences, sequences * -(-context // PAGE), PAGE, dtype, device)

    @property
    def bytes(self) -> int:
        return sum(pool.nbytes for layer in self.layers for pool in layer.values())

    def claim(self, form: str) -> None:
        """State in which form keys and values lie inside a page.

        Raises ValueError where it was another form before.

        The plain model and the torch executor write rows in order ("rows"); the CPU kernels write panels
        ("panels"), which only they can read.
        """
        if not self._executor:
            self._executor.append(form)
        if self._executor[0] != form:
            raise ValueError(
                f"this cache holds its pages as {self._executor[0]}, and they were asked for as {form}"
            )

    def save(self, slot: int, pages: Sequence[int], known: Sequence[list[Tensor]] = ()) -> OffloadedCache:
        """Copy a slot and these pages to the host. known: existing copies of the first pages, which are reused."""
        rows = [_to_host(pool[slot]) for pool in self.slot_pools]
        copies = ([_to_host(pool[page]) for pool in self.page_pools] for page in pages[len(known) :])
        return OffloadedCache(rows, (*known, *copies))

    def load(self, saved: OffloadedCache, slot: int, pages: Sequence[int]) -> None:
        """Copy `saved` back bit for bit, into any slot and any pages."""
        for pool, row in zip(self.slot_pools, saved.rows, strict=True):
            pool[slot].copy_(row)
        for page, parts in zip(pages, saved.pages, strict=False):
            for pool, part in zip(self.page_pools, parts, strict=True):
                pool[page].copy_(part)

    def fill(self, slots: Iterable[int], pages: Iterable[int], number: float) -> None:
        """Overwrite these slots and pages with zeros, or with NaN."""
        for pools, places in ((self.slot_pools, list(slots)), (self.page_pools, list(pages))):
            for pool in pools:
                for place in places:
                    if pool.dtype == torch.float8_e4m3fn:
                        pool[place].view(torch.uint8).fill_(0x7F if math.isnan(number) else 0)
                    else:
                        pool[place].fill_(number)

    def commit(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Accept draft tokens: the first counts[i] of the layout's speculative sequence rows[i].

        The sequences that are not named are as they were before the drafts.
        """
        for layer in self.layers:
            drafts, layer.drafts = layer.drafts, None
            if drafts is not None and rows:
                drafts.commit(layer, rows, counts)


def _to_host(row: Tensor) -> Tensor:
    return row.to("cpu", copy=True)
