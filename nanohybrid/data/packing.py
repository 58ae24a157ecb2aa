"""From a token store to the sequences of a batch: whole documents, or windows of those that are longer than a
sequence.

No target is lost: each target of a document is in exactly one sequence. The last target of a window is the
first token of the next window, so a split document loses context only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanohybrid.data.store import TokenStore

IGNORED = -100  # the target of a token that has no loss, as in torch's cross-entropy


@dataclass(frozen=True)
class SequenceIndex:
    """The sequences of a store, as arrays of one length: first token, number of tokens, and end of the
    document, in the store."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    document_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)


def index_sequences(store: TokenStore, sequence_length: int) -> SequenceIndex:
    """Each document as one sequence, or as windows of `sequence_length` tokens.

    The last token of a document predicts nothing, so it gets no window of its own. Empty documents have no
    sequence.
    """
    begins, ends = np.asarray(store.offsets[:-1]), np.asarray(store.offsets[1:])
    sizes = ends - begins
    windows = np.where(sizes > 0, np.maximum(1, -((1 - sizes) // sequence_length)), 0)
    document = np.repeat(np.arange(len(store)), windows)
    within = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)
    starts = begins[document] + within * sequence_length
    return SequenceIndex(starts, np.minimum(sequence_length, ends[document] - starts), ends[document])


def read_sequence(
    store: TokenStore, start: int, length: int, document_end: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and targets of a sequence, int64 [length].

    The target is the next token of the document; it is IGNORED at the end of a document and where the loss
    mask is 0.
    """
    targets = np.full(length, IGNORED, dtype=np.int64)
    count = min(length, document_end - start - 1)
    following = slice(start + 1, start + 1 + count)
    targets[:count] = np.where(store.loss_mask[following] != 0, store.tokens[following], IGNORED)
    return store.tokens[start : start + length].astype(np.int64), targets
