"""Batches as a pure function of (seed, step); a resumed run asks for its next step.

Each store is an endless stream of sequences, in a new order in every epoch. The mixture gives the number of
tokens of each stream before step k and before step k + 1; batch k has the sequences that start between the
two. The loader has no state, each sequence of an epoch is in exactly one batch, and for each store a batch
misses its share by less than one sequence.

T tokens of the packed batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanohybrid.data.mixture import Mixture
from nanohybrid.data.packing import IGNORED, index_sequences, read_sequence
from nanohybrid.data.store import TokensAndLossMask, TokenStore
from nanohybrid.errors import ConfigError
from nanohybrid.ops.layout import Layout


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end.

    tokens_T   int64 ids
    targets_T  int64: the next token of the document, or -100 where there is no loss
    layout     lengths and positions of the sequences
    """

    tokens_T: Tensor
    targets_T: Tensor
    layout: Layout

    @classmethod
    def of(cls, documents: Iterable[TokensAndLossMask]) -> "Batch":
        """A batch of whole documents, given as (tokens, loss mask)."""
        store = TokenStore.from_documents(documents)
        index = index_sequences(store, max(store.token_count, 1))
        return _pack(
            [
                read_sequence(store, *map(int, place))
                for place in zip(index.starts, index.lengths, index.document_ends, strict=True)
            ]
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(
            self.tokens_T.to(device, non_blocking=True),
            self.targets_T.to(device, non_blocking=True),
            self.layout,
        )

    @property
    def target_count(self) -> int:
        """Number of tokens that are targets."""
        return int((self.targets_T != IGNORED).sum())


class Loader:
    """Mixes stores into batches of about `batch_tokens` tokens, in sequences of at most `sequence_length`
    tokens.

    Raises ConfigError for sizes that are not positive, a mixture that does not fit the stores, an empty
    store, and batches so small that some would be empty.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        mixture: Mixture | Sequence[tuple[float, Mapping[str, float]]],
        batch_tokens: int,
        sequence_length: int,
        seed: int,
        total_steps: int,
    ) -> None:
        sizes = {"batch_tokens": batch_tokens, "sequence_length": sequence_length, "total_steps": total_steps}
        if min(sizes.values()) < 1:
            raise ConfigError(
                f"{', '.join(f'{name} {size}' for name, size in sizes.items())}: all must be positive"
            )
        if seed < 0:
            raise ConfigError(f"the seed is {seed}; give a number of 0 or more")
        mixture = mixture if isinstance(mixture, Mixture) else Mixture.of(mixture)
        self.mixture = mixture.among(stores)
        self.batch_tokens = batch_tokens
        self.total_steps = total_steps
        self.streams = {
            name: _Stream(name, stores[name], sequence_length, seed) for name in self.mixture.names
        }
        self._refuse_empty_batches()

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0. Steps beyond `total_steps` continue the last phase."""
        begin = self.mixture.tokens_before(step, self.total_steps, self.batch_tokens)
        end = self.mixture.tokens_before(step + 1, self.total_steps, self.batch_tokens)
        return _pack(
            [
                sequence
                for name, stream in self.streams.items()
                for sequence in stream.between(_whole_tokens(begin[name]), _whole_tokens(end[name]))
            ]
        )

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each store before `step`: the number of times that it has been read, with fractions."""
        tokens = self.mixture.tokens_before(step, self.total_steps, self.batch_tokens)
        return {name: tokens[name] / stream.total for name, stream in self.streams.items()}

    def _refuse_empty_batches(self) -> None:
        for phase in self.mixture.phases:
            name, share = max(phase.shares.items(), key=lambda item: item[1])
            longest = int(self.streams[name].index.lengths.max())
            if share * self.batch_tokens < longest:
                raise ConfigError(
                    f"batch_tokens {self.batch_tokens} leaves {name} {share * self.batch_tokens:.0f} tokens "
                    "a batch, less than its longest "
                    f"sequence ({longest}): some batches would be empty; take larger batches or a smaller "
                    "sequence_length"
                )


class _Stream:
    """The sequences of one store, epoch after epoch, addressed by their first token."""

    def __init__(self, name: str, store: TokenStore, sequence_length: int, seed: int) -> None:
        self.store = store
        self.index = index_sequences(store, sequence_length)
        self.total = int(self.index.lengths.sum())
        if self.total == 0:
            raise ConfigError(f"the store {name} is empty; leave it out of the mixture")
        self.entropy = [seed, int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")]
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the sequences in an epoch, and the first token of each in it."""
        order = np.random.default_rng([*self.entropy, epoch]).permutation(len(self.index))
        lengths = self.index.lengths[order]
        return order, np.cumsum(lengths) - lengths

    def between(self, begin: int, end: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Tokens and targets of the sequences that start in [begin, end)."""
        found = []
        for epoch in range(begin // self.total, -(-end // self.total)):
            order, begins = self.order(epoch)
            first, last = np.searchsorted(begins, (begin - epoch * self.total, end - epoch * self.total))
            for number in order[first:last]:
                place = (
                    self.index.starts[number],
                    self.index.lengths[number],
                    self.index.document_ends[number],
                )
                found.append(read_sequence(self.store, *map(int, place)))
        return found


def _whole_tokens(tokens: float) -> int:
    """Whole tokens.

    A sum of shares that is below a whole number by a rounding error counts as that number.
    """
    return int(tokens + 1e-6)


def _pack(sequences: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Batch:
    """Sequences of (tokens, targets) laid end to end."""
    empty = np.zeros(0, dtype=np.int64)
    tokens = np.concatenate([tokens for tokens, _ in sequences] or [empty])
    targets = np.concatenate([targets for _, targets in sequences] or [empty])
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        Layout.packed([len(tokens) for tokens, _ in sequences]),
    )
