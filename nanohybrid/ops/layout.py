"""How a ragged batch is laid out: tokens of several sequences end to end, and where each one's state is kept.

Training is a layout with nothing stored; prefill, chunked prefill and decode are layouts with slots and pages. A layout is
made once a step on the host from plain integers; index tensors are derived on first use and kept, so that nothing waits for
a device.

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

    lengths: tokens of each sequence here. positions: absolute position of each one's first token; 0 starts a sequence,
    more continues a stored one. slots: row of the state pools for each sequence, None where nothing is stored (training).
    pages: for each sequence, the pages that hold its keys and values, enough for position + length. speculative: indices of
    sequences whose tokens may be taken back; their states are not written until it is known how many stay (model/mixers/draft_tokens.py).
    seeds: a number for each sequence, by which states are rounded where they are kept in fp16; None is zeros.
    Raises ValueError where these disagree.
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
        """Documents end to end, none of which sees another; nothing is stored."""
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
        """Sequences with a place in the pools: prefill, continuation and decode, mixed at will."""
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
        """`with_cache` for simple callers: slot s owns the pages from s * n up, n enough for `context` tokens."""
        n = -(-context // page_size)
        return cls.with_cache(
            lengths, positions, slots, [range(slot * n, (slot + 1) * n) for slot in slots], page_size
        )

    def select(self, sequences: Sequence[int]) -> Layout:
        """Some of its sequences as a layout of their own, in this order; none of them speculative."""
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
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence begins among the tokens, and the end: S + 1 numbers."""
        return (0, *accumulate(self.lengths))

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def is_decode(self) -> bool:
        """One token for each stored sequence: the recurrent step applies."""
        return self.slots is not None and self.max_length == 1

    @cached_property
    def continues(self) -> tuple[int, ...]:
        """Indices of the sequences that continue a stored state."""
        return tuple(i for i, position in enumerate(self.positions) if position)

    @cached_property
    def slot_run(self) -> slice | None:
        """The slots as a slice, where they follow one another: pools can then be used in place, without a copy."""
        if not self.slots or any(slot != self.slots[0] + i for i, slot in enumerate(self.slots)):
            return None
        return slice(self.slots[0], self.slots[0] + len(self.slots))

    def tensor(self, name: str, device: torch.device, make: Callable[[], np.ndarray]) -> Tensor:
        """An index tensor of this layout on a device, made by `make` at first use."""
        key = (name, device)
        if key not in self._tensors:
            made = torch.from_numpy(np.ascontiguousarray(make()))
            made = (
                made.pin_memory() if device.type == "cuda" else made
            )  # a copy from other memory would wait for the device
            self._tensors[key] = made.to(device, non_blocking=True)
        return self._tensors[key]

    def memoize(self, name: str, make: Callable[[], M]) -> M:
        """Something an op derives from this layout on the host, made by `make` at first use."""
        if name not in self._derived:
            self._derived[name] = make()
        found: M = self._derived[name]
        return found

    def on_device(self, device: torch.device, tables: dict[str, Tensor]) -> Layout:
        """This layout with index tensors that are given instead of derived, for work that is recorded once and replayed over
        whatever they then hold."""
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
        """State slot of each sequence; int64 [S]. Only for stored layouts."""
        return self.tensor("slots", device, lambda: np.asarray(self.slots, dtype=np.int64))

    def fresh_mask(self, device: torch.device) -> Tensor:
        """True for the sequences that begin here; bool [S]."""
        return self.tensor("fresh", device, lambda: np.asarray(self.positions) == 0)

    def plan(self, chunk: int | None) -> Plan:
        """Cut the sequences at multiples of `chunk` of their absolute position (None: not at all) into padded blocks."""
        if chunk not in self._plans:
            self._plans[chunk] = _make_plan(self, chunk)
        return self._plans[chunk]


@dataclass(frozen=True)
class Block:
    """Pieces of different sequences, padded to one width and worked on together."""

    sequences: tuple[int, ...]
    width: int
    round: (
        int  # which piece of its sequence each one is; pieces of a later round follow those of an earlier one
    )
    last: bool  # whether no piece here has a successor

    @property
    def rows(self) -> int:
        return len(self.sequences) * self.width


@dataclass(frozen=True, eq=False)
class Plan:
    """A permutation of the tokens, with padding, in which every block is a contiguous rectangle.

    Each token stands in exactly one row, so both directions, and both gradients, are row gathers.
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
        """[T, ...] -> one [pieces, width, ...] for each block, zeros where padded."""
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
    pieces: dict[
        tuple[int, int], list[tuple[int, int, int]]
    ] = {}  # (round, bucket) -> (sequence, first token, length)
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
            pieces.setdefault((index, bucket), []).append((sequence, start + done, take))
            done, index = done + take, index + 1
        rounds[sequence] = index
    blocks, order, valid = [], [], []
    for (index, _), members in sorted(pieces.items()):
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
