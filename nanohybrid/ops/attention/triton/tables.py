"""Index tables of a layout for the attention kernels, memoized with the layout for all layers."""

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout


def page_table(layout: Layout, device: torch.device) -> Tensor:
    """The pages of each sequence, int64 [S, most pages of any].

    Entries past a sequence's own pages are not read.
    """

    def table() -> np.ndarray:
        owned = layout.pages or ()
        rows = np.zeros((len(owned), max(map(len, owned), default=0)), dtype=np.int64)
        for row, its_pages in zip(rows, owned, strict=True):
            row[: len(its_pages)] = its_pages
        return rows

    return layout.tensor("page_table", device, table)


def tiles(layout: Layout, size: int, device: torch.device) -> Tensor:
    """Tiles of up to `size` neighboring tokens of one sequence: first token, count, its absolute position,
    sequence; int64 [X, 4].

    Tiles with the longest context come first, so that no long one is left for the end.
    """

    def table() -> np.ndarray:
        found = []
        for i, (start, length, position) in enumerate(
            zip(layout.starts, layout.lengths, layout.positions, strict=False)
        ):
            found += [
                (start + done, min(size, length - done), position + done, i)
                for done in range(0, length, size)
            ]
        return np.asarray(sorted(found, key=lambda tile: -tile[2]), dtype=np.int64).reshape(-1, 4)

    return layout.tensor(f"query_tiles{size}", device, table)
