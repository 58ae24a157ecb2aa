"""The layout of a ragged batch: tokens of several sequences end to end, and where their caches are.

It is what vLLM calls attention metadata. Training has a layout without a cache; prefill, chunked prefill and
decode have layouts with slots and pages. A layout is built once per step on the host from plain integers.
Index tensors are derived on first use and memoized, so no step waits for a device.

T tokens · S sequences · R padded rows · Q chunk length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanohybrid.ops.sizes import PAGE

M = TypeVar("M")


@dataclass(frozen=True, eq=False)
class Layout:
    """A ragged batch.

    lengths: tokens of each sequence in the batch. positions: absolute position of each sequence's first
    token; 0 starts a sequence, more continues one from its cache. slots: row of the recurrent states for each
    sequence; None without a cache (training). pages: for each sequence, the pages that hold its keys and
    values, enough for position + length. speculative: indices of sequences whose tokens are drafts. Their
    states are not written until it is known how many are accepted (model/mixers/draft_tokens.py). seeds: a
    number for each sequence, the seed of stochastic rounding of states in fp16; None is zeros.

    Raises ValueError where these contradict each other.
    """

    lengths: tuple[int, ...]
    positions: tuple[int, ...]
    slots: tuple[int, ...] | None = None
    pages: tuple[tuple[int, ...], ...] | None = None
    page_size: int = PAGE
    speculative: tuple[int, ...] = ()
    seeds: tuple[int, ...] | None = None
    _tensors: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)
    _derived: dict[str, Any] = field(default_factory=dict, repr=False)
    _plans: dict[int | None, Plan] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.lengths):
            raise ValueError(
                f"every sequence of a layout needs at least one token, lengths are {self.lengths}"
            )
        if len(self.positions) != len(self.lengths) or any(position < 0 for position in self.positions):
            raise ValueError("a layout needs one position of 0 or more for each sequence")
        if self.slots is None:
            if any(self.positions):
                raise ValueError("a sequence that continues needs a slot that holds its state")
        elif len(self.slots) != len(self.lengths) or len(set(self.slots)) != len(self.slots):
            raise ValueError("a layout needs one slot of its own for each sequence")
        if self.pages is not None:
            for owned, position, length in zip(self.pages, self.positions, self.lengths, strict=True):
                if len(owned) * self.page_size < position + length:
                    raise ValueError(
                        f"{len(owned)} pages of {self.page_size} cannot hold {position + length} tokens"
                    )

    @classmethod
    def packed(cls, lengths: Sequence[int]) -> Layout:
        """Documents end to end that do not see each other, without a cache."""
        return cls(tuple(lengths), (0,) * len(lengths))

    @classmethod
    def equal(cls, batch: int, length: int) -> Layout:
        """`batch` sequences of one length, as in a rectangular batch."""
        return cls.packed((length,) * batch)

    @classmethod
    def with_cache(
        cls,
        lengths: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int = PAGE,
        speculative: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
    ) -> Layout:
        """Sequences with slots and pages: prefill, continuation and decode, in any mix."""
        seeds = None if seeds is None else tuple(seeds)
        return cls(
            tuple(lengths),
            tuple(positions),
            tuple(slots),
            tuple(map(tuple, pages)),
            page_size,
            tuple(speculative),
            seeds,
        )

    @classmethod
    def contiguous(
        cls,
        lengths: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        context: int,
        page_size: int = PAGE,
    ) -> Layout:
        """`with_cache` where slot s owns the n pages from s * n on, enough for `context` tokens."""
        n = -(-context // page_size)
        return cls.with_cache(
            lengths, positions, slots, [range(slot * n, (slot + 1) * n) for slot in slots], page_size
        )

    def select(self, sequences: Sequence[int]) -> Layout:
        """A layout of these sequences, in this order; none of them is speculative."""
        slots = None if self.slots is None else tuple(self.slots[i] for i in sequences)
        pages = None if self.pages is None else tuple(self.pages[i] for i in sequences)
        seeds = None if self.seeds is None else tuple(self.seeds[i] for i in sequences)
        lengths, positions = (
            tuple(self.lengths[i] for i in sequences),
            tuple(self.positions[i] for i in sequences),
        )
        return Layout(lengths, positions, slots, pages, self.page_size, seeds=seeds)

    @property
    def sequences(self) -> int:
        """The number of sequences, S."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of each sequence's first token in the batch, then T: S + 1 numbers."""
        return (0, *accumulate(self.lengths))

    @property
    def tokens(self) -> int:
        """The number of tokens, T."""
        return self.starts[-1]

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest sequence in the batch."""
        return max(self.lengths, default=0)

    @cached_property
    def is_decode(self) -> bool:
        """Whether every sequence has a cache and one token, so that the recurrent step applies."""
        return self.slots is not None and self.max_length == 1

    @cached_property
    def continues(self) -> tuple[int, ...]:
        """Indices of the sequences that continue from their cache."""
        return tuple(i for i, position in enumerate(self.positions) if position)

    @cached_property
    def contiguous_slots(self) -> slice | None:
        """The slots as a slice where they are consecutive, so that states can be used in place; else None."""
        if not self.slots or any(slot != self.slots[0] + i for i, slot in enumerate(self.slots)):
            return None
        return slice(self.slots[0], self.slots[0] + len(self.slots))

    def tensor(self, name: str, device: torch.device, make: Callable[[], np.ndarray]) -> Tensor:
        """An index tensor of this layout on a device, computed by `make` on first use."""
        key = (name, device)
        if key not in self._tensors:
            made = torch.from_numpy(np.ascontiguousarray(make()))
            # A copy from memory that is not pinned would wait for the device.
            made = made.pin_memory() if device.type == "cuda" else made
            self._tensors[key] = made.to(device, non_blocking=True)
        return self._tensors[key]

    def memoize(self, name: str, make: Callable[[], M]) -> M:
        """A value that an op derives from this layout on the host, computed by `make` on first use."""
        if name not in self._derived:
            self._derived[name] = make()
        found: M = self._derived[name]
        return found

    def on_device(self, device: torch.device, tables: dict[str, Tensor]) -> Layout:
        """This layout with the given index tensors instead of derived ones.

        CUDA graphs are recorded and replayed over their contents.
        """
        self._tensors.update({(name, device): table for name, table in tables.items()})
        return self

    def offsets(self) -> np.ndarray:
        """For each token, how many tokens of its sequence precede it in this batch; int64 [T]."""
        return np.arange(self.tokens) - np.repeat(np.asarray(self.starts[:-1]), self.lengths)

    def token_positions(self, device: torch.device) -> Tensor:
        """Absolute position of each token; int64 [T]."""
        return self.tensor(
            "positions", device, lambda: self.offsets() + np.repeat(np.asarray(self.positions), self.lengths)
        )

    def slot_index(self, device: torch.device) -> Tensor:
        """Slot of each sequence; int64 [S]. Only for layouts with a cache."""
        return self.tensor("slots", device, lambda: np.asarray(self.slots, dtype=np.int64))

    def fresh_mask(self, device: torch.device) -> Tensor:
        """True for the sequences that start in this batch; bool [S]."""
        return self.tensor("fresh", device, lambda: np.asarray(self.positions) == 0)

    def plan(self, chunk: int | None) -> Plan:
        """Cut the sequences at multiples of `chunk` of their position (None: not at all) into padded
        blocks.
        """
        if chunk not in self._plans:
            self._plans[chunk] = _make_plan(self, chunk)
        return self._plans[chunk]


@dataclass(frozen=True)
class Block:
    """Chunks of different sequences, padded to one width and computed together.

    round: the index of each chunk in its sequence. Chunks of a later round follow those of an earlier one.
    last: whether no chunk in the block is followed by another.
    """

    sequences: tuple[int, ...]
    width: int
    round: int
    last: bool

    @property
    def rows(self) -> int:
        """Rows of the block, padding included."""
        return len(self.sequences) * self.width


@dataclass(frozen=True, eq=False)
class Plan:
    """A permutation of the tokens, with padding, in which every block is a contiguous rectangle.

    Each token is in exactly one row, so `split`, `join` and both gradients are row gathers.
    """

    blocks: tuple[Block, ...]
    order: np.ndarray  # [R] token of each padded row (0 where padding)
    padding: np.ndarray  # rows that hold padding
    inverse: np.ndarray  # [T] row of each token
    identity: bool
    _device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._device:
            arrays = (self.order, self.padding, self.inverse)
            self._device[device] = tuple(torch.from_numpy(array).to(device) for array in arrays)  # type: ignore[assignment]
        return self._device[device]

    def split(self, x: Tensor) -> list[Tensor]:
        """[T, ...] -> one [chunks, width, ...] for each block, zeros where padded."""
        if not self.identity:
            order, padding, inverse = self._indices(x.device)
            x = _Permute.apply(x, order, padding, inverse, None)
        parts = x.split([block.rows for block in self.blocks])
        return [
            part.unflatten(0, (len(block.sequences), block.width))
            for part, block in zip(parts, self.blocks, strict=True)
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`: drops the padding and restores the order of the tokens."""
        flat = [part.flatten(0, 1) for part in parts]
        x = flat[0] if len(flat) == 1 else torch.cat(flat)
        if self.identity:
            return x
        order, padding, inverse = self._indices(x.device)
        return _Permute.apply(x, inverse, None, order, padding)


class _Permute(torch.autograd.Function):
    """Gather rows by `index` and zero the rows `fill`; the gradient gathers by the inverse."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, fill: Tensor | None, back: Tensor, back_fill: Tensor | None
    ) -> Tensor:
        ctx.back, ctx.back_fill = back, back_fill
        out = x.index_select(0, index)
        return out if fill is None else out.index_fill_(0, fill, 0)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        out = grad.index_select(0, ctx.back)
        return (
            (out if ctx.back_fill is None else out.index_fill_(0, ctx.back_fill, 0)),
            None,
            None,
            None,
            None,
        )


def _make_plan(layout: Layout, chunk: int | None) -> Plan:
    # (round, bucket) -> (sequence, first token, length)
    chunks: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    rounds = [0] * layout.sequences
    for sequence, (start, length, position) in enumerate(
        zip(layout.starts, layout.lengths, layout.positions, strict=False)
    ):
        done, index = 0, 0
        while done < length:
            take = length - done if chunk is None else min(length - done, chunk - (position + done) % chunk)
            bucket = max(
                16, 1 << (take - 1).bit_length()
            )  # powers of two: at most half of a block is padding
            chunks.setdefault((index, bucket), []).append((sequence, start + done, take))
            done, index = done + take, index + 1
        rounds[sequence] = index
    blocks, order, valid = [], [], []
    for (index, _), members in sorted(chunks.items()):
        width = max(take for _, _, take in members)
        ids = tuple(sequence for sequence, _, _ in members)
        blocks.append(Block(ids, width, index, all(rounds[i] == index + 1 for i in ids)))
        first = np.array([[start] for _, start, _ in members])
        inside = np.arange(width)[None, :] < np.array([[take] for _, _, take in members])
        order.append(np.where(inside, first + np.arange(width)[None, :], 0).ravel())
        valid.append(inside.ravel())
    all_order = np.concatenate(order) if order else np.zeros(0, dtype=np.int64)
    all_valid = np.concatenate(valid) if valid else np.zeros(0, dtype=bool)
    inverse = np.empty(layout.tokens, dtype=np.int64)
    inverse[all_order[all_valid]] = np.flatnonzero(all_valid)
    identity = len(all_order) == layout.tokens and bool((all_order == np.arange(layout.tokens)).all())
    return Plan(tuple(blocks), all_order, np.flatnonzero(~all_valid), inverse, identity)
