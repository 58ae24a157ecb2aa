"""Reading and writing rows of a pool of pages; reads copy nothing where possible."""

import numpy as np
from torch import Tensor

from nanohybrid.ops.layout import Layout


def write(pool: Tensor, rows_TKP: Tensor, layout: Layout) -> None:
    """Store each token's row at its absolute position in its sequence's pages."""
    assert layout.pages is not None

    def index() -> np.ndarray:
        positions = layout.offsets() + np.repeat(np.asarray(layout.positions), layout.lengths)
        table = np.concatenate([np.asarray(pages) for pages in layout.pages or ()])
        first = np.repeat(np.cumsum([0, *map(len, layout.pages or ())])[:-1], layout.lengths)
        return table[first + positions // layout.page_size] * layout.page_size + positions % layout.page_size

    pool.flatten(0, 1).index_copy_(0, layout.tensor("page_rows", pool.device, index), rows_TKP.to(pool.dtype))


def read(pool: Tensor, layout: Layout, sequences: tuple[int, ...], context: int) -> Tensor:
    """[sequences, context, K, P]: the first `context` rows of each sequence's pages.

    Rows past its end hold finite numbers.

    It is a view of the pool where every sequence owns consecutive pages and these runs are evenly spaced,
    otherwise a gather.
    """
    need = -(-context // layout.page_size)
    owned, stride = _runs(layout, sequences, need)
    if stride is not None:
        page, row, *rest = pool.stride()
        first = pool[owned[0][0]]
        return first.as_strided(
            (len(owned), context, *pool.shape[2:]), (stride * page, row, *rest), first.storage_offset()
        )

    def table() -> np.ndarray:
        # A sequence with fewer pages repeats its own first page.
        return np.asarray([[*o, *([o[0]] * (need - len(o)))] for o in owned])

    index = layout.tensor(f"page_table{sequences}{need}", pool.device, table)
    return pool[index].flatten(1, 2)[:, :context]


def _runs(layout: Layout, sequences: tuple[int, ...], need: int) -> tuple[list[tuple[int, ...]], int | None]:
    """The first `need` pages of each sequence, and their distance where all are consecutive and evenly
    spaced.

    The answer is memoized with the layout: every layer asks for the same, for keys and for values.
    """
    owned = layout.pages or ()
    return layout.memoize(
        f"runs{sequences}{need}", lambda: _find_runs([owned[i][:need] for i in sequences], need)
    )


def _find_runs(owned: list[tuple[int, ...]], need: int) -> tuple[list[tuple[int, ...]], int | None]:
    stride = owned[1][0] - owned[0][0] if len(owned) > 1 else need
    even = all(
        pages == tuple(range(owned[0][0] + n * stride, owned[0][0] + n * stride + need))
        for n, pages in enumerate(owned)
    )
    return owned, stride if even and stride > 0 else None
