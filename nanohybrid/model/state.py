"""The memory of a model between calls: for each layer, pools of what it declares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanohybrid.config import HybridConfig
from nanohybrid.model.axes import axis_sizes, shape
from nanohybrid.model.declare import states
from nanohybrid.ops.layout import PAGE


@dataclass(frozen=True, eq=False)
class State:
    """layers[i] maps a name to its pool: [slots, ...] for what a sequence keeps, [pages, page size, ...] for its tokens.

    The forward reads and writes the pools in place, by the layout's slots and pages. A sequence that begins reads zeros
    whatever its slot holds.
    """

    layers: list[dict[str, Tensor]]
    slots: int
    pages: int
    page_size: int

    @classmethod
    def allocate(
        cls,
        config: HybridConfig,
        slots: int,
        pages: int,
        page_size: int = PAGE,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> State:
        """Zeroed pools; `dtype` is that of the activations, the SSM state is fp32 whatever it is (float64 for float64)."""
        sizes = axis_sizes(config)
        layers = []
        for declared in states(config):
            pools = {}
            for name, spec in declared.items():
                rows = (pages, page_size) if spec.per_token else (slots,)
                pools[name] = torch.zeros(*rows, *shape(spec.axes, sizes), dtype=spec.kind(dtype), device=device)
            layers.append(pools)
        return cls(layers, slots, pages, page_size)

    @classmethod
    def for_context(
        cls, config: HybridConfig, sequences: int, context: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> State:
        """Pools for `sequences` of up to `context` tokens, to be used with Layout.contiguous(..., context)."""
        return cls.allocate(config, sequences, sequences * -(-context // PAGE), PAGE, dtype, device)

    @property
    def bytes(self) -> int:
        return sum(pool.nbytes for layer in self.layers for pool in layer.values())
