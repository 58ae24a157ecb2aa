"""The memory of a model between calls: for each layer, pools of what it declares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.model.mixers.draft_tokens import LayerCache
from nanohybrid.model.spec import kept
from nanohybrid.ops.sizes import PAGE


@dataclass(frozen=True, eq=False)
class OffloadedCache:
    """What one sequence left in the pools, in host memory and never changed: its slot's rows, and its pages one by one."""

    rows: list[Tensor]
    pages: tuple[list[Tensor], ...]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Identity and bytes of each piece of memory in it: copies that share a page name the same piece."""
        return [(id(piece), sum(tensor.nbytes for tensor in piece)) for piece in (self.rows, *self.pages)]


@dataclass(frozen=True, eq=False)
class HybridCache:
    """layers[i] maps a name to its pool: [slots, ...] for what a sequence keeps, [pages, page size, ...] for its tokens.

    The forward reads and writes the pools in place, by the layout's slots and pages. A sequence that begins reads zeros
    whatever its slot holds.
    """

    layers: list[LayerCache]
    slots: int
    pages: int
    page_size: int
    slot_pools: list[Tensor]
    page_pools: list[Tensor]
    remembered: dict[str, Any] = field(
        default_factory=dict
    )  # what a model derives from these pools' addresses

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
        """Zeroed pools; `dtype` is that of the activations, the SSM state is fp32 whatever it is (float64 for float64), unless
        `state_dtype` and `kv_dtype` say otherwise (declare.kept)."""
        layers: list[LayerCache] = []
        slot_pools: list[Tensor] = []
        page_pools: list[Tensor] = []
        for index, stored in enumerate(kept(config, dtype, state_dtype, kv_dtype)):
            pools = LayerCache(index)
            for name, one in stored.items():
                rows = (pages, page_size) if one.per_token else (slots,)
                pools[name] = torch.zeros(*rows, *one.shape, dtype=one.dtype, device=device)
                (page_pools if one.per_token else slot_pools).append(pools[name])
            layers.append(pools)
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
        """Pools for `sequences` of up to `context` tokens, to be used with Layout.contiguous(..., context)."""
        return cls.allocate(config, sequences, sequences * -(-context // PAGE), PAGE, dtype, device)

    @property
    def bytes(self) -> int:
        return sum(pool.nbytes for layer in self.layers for pool in layer.values())

    def save(self, slot: int, pages: Sequence[int], known: Sequence[list[Tensor]] = ()) -> OffloadedCache:
        """Copy a slot and these pages to the host; `known` are copies of the first pages that exist already."""
        rows = [_host(pool[slot]) for pool in self.slot_pools]
        return OffloadedCache(
            rows, (*known, *([_host(pool[page]) for pool in self.page_pools] for page in pages[len(known) :]))
        )

    def load(self, saved: OffloadedCache, slot: int, pages: Sequence[int]) -> None:
        """Put it back, into any slot and any pages, bit for bit."""
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

    def settle(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Of the layout's speculative sequences, in their order, let the first `counts` tokens of those in `rows` stay; the others
        are as if the window had never been."""
        for pools in self.layers:
            window, pools.window = pools.window, None
            if window is not None and rows:
                window.settle(pools, rows, counts)


def _host(row: Tensor) -> Tensor:
    return row.to("cpu", copy=True)
