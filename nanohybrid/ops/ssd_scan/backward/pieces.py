"""Pieces of sequences between multiples of 128 of the absolute position, as the kernels read them.

Z pieces in the order of the tokens · S sequences.
"""

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK


def table(layout: Layout, device: torch.device, initial: bool, final: bool) -> Tensor:
    """int64 [4, Z]: first token, length, whether a state enters, whether the state that leaves has a gradient.

    initial: whether sequences start from a state. final: whether their last states have gradients.
    """

    def make() -> np.ndarray:
        edges = _edges(layout)
        first, last = np.zeros(len(edges) - 1, dtype=bool), np.zeros(len(edges) - 1, dtype=bool)
        bounds = _bounds(layout)
        first[bounds[:-1]], last[bounds[1:] - 1] = True, True
        return np.stack([edges[:-1], np.diff(edges), ~first | initial, ~last | final]).astype(np.int64)

    return layout.tensor(f"ssd_pieces_{initial}_{final}", device, make)


def bounds(layout: Layout, device: torch.device) -> Tensor:
    """int64 [S + 1]: the first piece of each sequence, and the end."""
    return layout.tensor("ssd_piece_bounds", device, lambda: _bounds(layout))


def _bounds(layout: Layout) -> np.ndarray:
    begin, length = np.asarray(layout.positions), np.asarray(layout.lengths)
    counts = (begin + length - 1) // CHUNK - begin // CHUNK + 1
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _edges(layout: Layout) -> np.ndarray:
    """Where pieces begin among the tokens, and the end; int64 [Z + 1]."""
    positions = np.asarray(layout.positions)
    offsets = layout.offsets()
    cut = ((offsets + np.repeat(positions, layout.lengths)) % CHUNK == 0) | (offsets == 0)
    return np.concatenate([np.flatnonzero(cut), [layout.tokens]]).astype(np.int64)
