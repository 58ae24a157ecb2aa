"""Batches as a pure function of (seed, step): to resume is to ask for the next step.

Each store is an endless stream of pieces, in a new order every epoch. The mixture says how many tokens of the stream the steps
before k and before k + 1 take; batch k holds the pieces that begin between the two. So nothing is carried from step to step,
every piece of an epoch is in exactly one batch, and a batch misses its size and its weights by less than a document a store.

T tokens of the ragged batch.
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
from nanohybrid.data.packing import IGNORED, cut, read
from nanohybrid.data.store import TokensAndLoss, TokenStore
from nanohybrid.errors import ConfigError
from nanohybrid.ops.layout import Layout


@dataclass(frozen=True)
class Batch:
    """Documents end to end. targets_T holds the token that follows, or -100 where nothing is to be learned."""

    tokens_T: Tensor
    targets_T: Tensor
    layout: Layout

    @classmethod
    def of(cls, documents: Iterable[TokensAndLoss]) -> "Batch":
        """A batch of whole documents, given as pairs of tokens and loss flags."""
        store = TokenStore.from_documents(documents)
        pieces = cut(store, max(store.token_count, 1))
        return _pack(
            [
                read(store, *map(int, piece))
                for piece in zip(pieces.starts, pieces.lengths, pieces.document_ends, strict=True)
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
        """Tokens that are learned."""
        return int((self.targets_T != IGNORED).sum())


class Loader:
    """Mixes stores into batches of about `batch_tokens` tokens, in sequences of at most `sequence_length`."""

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
        """The batch of a step, counted from 0; the last phase goes on where `step` is past the end."""
        begin = self.mixture.tokens_before(step, self.total_steps, self.batch_tokens)
        end = self.mixture.tokens_before(step + 1, self.total_steps, self.batch_tokens)
        return _pack(
            [
                piece
                for name, stream in self.streams.items()
                for piece in stream.between(_whole(begin[name]), _whole(end[name]))
            ]
        )

    def epochs(self, step: int) -> dict[str, float]:
        """How often each store has been read before `step`."""
        tokens = self.mixture.tokens_before(step, self.total_steps, self.batch_tokens)
        return {name: tokens[name] / stream.total for name, stream in self.streams.items()}

    def _refuse_empty_batches(self) -> None:
        for phase in self.mixture.phases:
            name, share = max(phase.shares.items(), key=lambda item: item[1])
            longest = int(self.streams[name].pieces.lengths.max())
            if share * self.batch_tokens < longest:
                raise ConfigError(
                    f"batch_tokens {self.batch_tokens} leaves {name} {share * self.batch_tokens:.0f} tokens a batch, less than its longest "
                    f"sequence ({longest}): some batches would be empty; take larger batches or a smaller sequence_length"
                )


class _Stream:
    """The pieces of one store, epoch after epoch, as a line of tokens that can be cut anywhere."""

    def __init__(self, name: str, store: TokenStore, sequence_length: int, seed: int) -> None:
        self.store = store
        self.pieces = cut(store, sequence_length)
        self.total = int(self.pieces.lengths.sum())
        if self.total == 0:
            raise ConfigError(f"the store {name} is empty; leave it out of the mixture")
        self.entropy = [seed, int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")]
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pieces in the order of an epoch, and where each begins in it."""
        order = np.random.default_rng([*self.entropy, epoch]).permutation(len(self.pieces))
        lengths = self.pieces.lengths[order]
        return order, np.cumsum(lengths) - lengths

    def between(self, begin: int, end: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The pieces that begin at `begin` or after it and before `end`."""
        found = []
        for epoch in range(begin // self.total, -(-end // self.total)):
            order, begins = self.order(epoch)
            first, last = np.searchsorted(begins, (begin - epoch * self.total, end - epoch * self.total))
            for piece in order[first:last]:
                place = (
                    self.pieces.starts[piece],
                    self.pieces.lengths[piece],
                    self.pieces.document_ends[piece],
                )
                found.append(read(self.store, *map(int, place)))
        return found


def _whole(tokens: float) -> int:
    """Whole tokens; a sum of shares that missed a whole number by rounding counts as that number."""
    return int(tokens + 1e-6)


def _pack(pieces: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Batch:
    """Pieces of (tokens, targets) laid end to end."""
    empty = np.zeros(0, dtype=np.int64)
    tokens = np.concatenate([tokens for tokens, _ in pieces] or [empty])
    targets = np.concatenate([targets for _, targets in pieces] or [empty])
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        Layout.packed([len(tokens) for tokens, _ in pieces]),
    )
