"""The first token and the length of each chunk of a layout, computed once on the host for all layers."""

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK


def chunks(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First token [Z] and length [Z] of each chunk; first chunk of each sequence, and Z [S + 1]; int64."""

    def table() -> np.ndarray:
        starts, lengths, first = [], [], [0]
        for start, length, position in zip(layout.starts, layout.lengths, layout.positions, strict=False):
            end = position + length
            cuts = [position, *range((position // CHUNK + 1) * CHUNK, end, CHUNK), end]
            starts += [start + cut - position for cut in cuts[:-1]]
            lengths += np.diff(cuts).tolist()
            first.append(len(starts))
        return np.asarray([*starts, *lengths, *first], dtype=np.int64)

    found = layout.tensor("ssd_chunks", device, table)
    Z = (len(found) - layout.sequences - 1) // 2
    return found[:Z], found[Z : 2 * Z], found[2 * Z :]
