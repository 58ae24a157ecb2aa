"""States kept in fp16: how they are rounded when they are stored, by a hash of (seed, position, layer) and
nothing else.

Z sequences · L tokens of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.stochastic import keys, to_half


@dataclass(frozen=True, eq=False)
class Rounding:
    """For each sequence and token, the key under which the state after it is rounded."""

    key_ZL: Tensor
    layer: int

    @classmethod
    def of(cls, layout: Layout, layer: int, device: torch.device) -> Rounding:
        """After each token of each sequence, or, where one brings more than others, after its last from there on."""

        def make() -> np.ndarray:
            seeds = np.array(
                [seed % 2**64 for seed in layout.seeds or [0] * layout.sequences], dtype=np.uint64
            )
            within = np.minimum(
                np.arange(1, layout.max_length + 1)[None, :], np.asarray(layout.lengths)[:, None]
            )
            return keys(
                np.broadcast_to(seeds[:, None], within.shape),
                (np.asarray(layout.positions)[:, None] + within).astype(np.uint64),
            )

        return cls(layout.tensor("rounding", device, make), layer)

    def rows(self, rows_R: Tensor) -> Rounding:
        return Rounding(self.key_ZL[rows_R], self.layer)

    def after(self, state_ZHPN: Tensor, token: int) -> Tensor:
        """The states after a token, in fp16; -1 is the last of each sequence."""
        return to_half(state_ZHPN.float(), self.key_ZL[:, token], self.layer)
