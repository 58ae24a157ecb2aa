"""Chunks of a layout for the gradient's kernels: the forward pass's, with what crosses their borders."""

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.ssd_scan.triton.chunks import chunks


def chunk_table(layout: Layout, device: torch.device, initial: bool, final: bool) -> Tensor:
    """int64 [4, Z]: first token, length, whether a state enters, whether the leaving state has a gradient.

    initial: whether sequences start from a state. final: whether their last states have gradients.
    """

    def make() -> np.ndarray:
        starts, lengths, first = (t.numpy() for t in chunks(layout, torch.device("cpu")))
        enters, leaves = np.ones_like(starts), np.ones_like(starts)
        enters[first[:-1]], leaves[first[1:] - 1] = initial, final
        return np.stack([starts, lengths, enters, leaves])

    return layout.tensor(f"ssd_chunks_{initial}_{final}", device, make)
