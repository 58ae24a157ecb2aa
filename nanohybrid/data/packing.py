"""From a store to the pieces of a batch: whole documents where they fit, windows of them where they do not.

Nothing that can be learned is lost: every target of a document is in exactly one piece. A window's last target is the first
token of the next window, so only the context is cut.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanohybrid.data.store import TokenStore

IGNORED = -100  # a target that is none, as in torch's cross-entropy


@dataclass(frozen=True)
class Pieces:
    """Pieces of a store as arrays: where each begins among the store's tokens, its length, and where its document ends."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    document_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)


def cut(store: TokenStore, sequence_length: int) -> Pieces:
    """Every document as one piece, or as windows of `sequence_length`.

    A document's last token predicts nothing: it gets no window of its own. Empty documents have no piece.
    """
    begins, ends = np.asarray(store.offsets[:-1]), np.asarray(store.offsets[1:])
    sizes = ends - begins
    windows = np.where(sizes > 0, np.maximum(1, -((1 - sizes) // sequence_length)), 0)
    document = np.repeat(np.arange(len(store)), windows)
    within = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)
    starts = begins[document] + within * sequence_length
    return Pieces(starts, np.minimum(sequence_length, ends[document] - starts), ends[document])


def read(
    store: TokenStore, start: int, length: int, document_end: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of a piece, and for each the token that follows it in its document: IGNORED where none does or it is not learned."""
    targets = np.full(length, IGNORED, dtype=np.int64)
    count = min(length, document_end - start - 1)
    following = slice(start + 1, start + 1 + count)
    targets[:count] = np.where(store.loss[following] != 0, store.tokens[following], IGNORED)
    return store.tokens[start : start + length].astype(np.int64), targets
