"""The forward of a packed model as one kernel: the model and its state as the tables that executors/cpu/kernels/forward.py reads.

T tokens · E embedding · P size of a head.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from nanohybrid.config import ATTENTION, MAMBA
from nanohybrid.config import MLP as MLP_KIND
from nanohybrid.executors.cpu.kernels import forward as step
from nanohybrid.executors.cpu.kernels.gemm import FEW, OUTPUTS, ROWS_AT_ONCE
from nanohybrid.executors.cpu.kernels.packing import Packed
from nanohybrid.executors.cpu.weights import PackedLinear
from nanohybrid.model.mixers.attention import Attention, rotary_angles
from nanohybrid.model.mixers.mamba2 import Mamba2
from nanohybrid.model.mixers.mlp import MLP
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.numba import threads as team
from nanohybrid.ops.sizes import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nanohybrid.model.cache import HybridCache
    from nanohybrid.model.lm import HybridLM


def compiled_forward(model: HybridLM, state: HybridCache) -> CompiledForward | None:
    """The one that belongs to this state, made at the first call; None where the state is kept in other types than the kernels'."""
    where = [pools[0].data_ptr() for pools in (state.slot_pools, state.page_pools) if pools]
    if state.remembered.get("compiled", (None,))[0] != (
        where,
        id(model),
    ):  # a copied state is other memory, all of it
        kinds = {"conv": torch.bfloat16, "ssm": torch.float32, "key": torch.bfloat16, "value": torch.bfloat16}
        fits = all(kinds.get(name) == pool.dtype for pools in state.layers for name, pool in pools.items())
        forward = CompiledForward(model, state) if fits and state.page_size == PAGE else None
        state.remembered["compiled"] = (where, id(model)), forward
    found: CompiledForward | None = state.remembered["compiled"][1]
    return found


class CompiledForward:
    """Forwards of one packed model (executors/cpu/weights.py) over one state, whose memory it reads and writes where it lies.

    Inside a page, keys and values lie in an order of their own (executors/cpu/kernels/kv_cache.py), which nothing else reads.
    """

    def __init__(self, model: HybridLM, state: HybridCache) -> None:
        self.config = config = model.config
        self._embeddings = model.backbone.embeddings.weight
        self._kept: list[Tensor | Packed] = []  # what only the tables point to
        self._records: list[np.ndarray] = []
        rows = [
            self._layer(cast(Any, block), state.layers[i]) for i, block in enumerate(model.backbone.layers)
        ]
        rows.append([0, self._address(model.backbone.norm_f.weight)])
        self._layers = np.zeros((len(rows), len(step.LAYERS)), dtype=np.int64)
        for index, row in enumerate(rows):
            self._layers[index, : len(row)] = row
        self._linears = np.stack(self._records)
        mamba = (
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.n_groups,
            config.ssm_state_size,
            config.conv_kernel,
        )
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self._mamba = np.array(mamba if MAMBA in config.pattern else (0,) * 5, dtype=np.int64)
        gated = config.mlp_activation == "swiglu"
        self._attention = np.array(
            (*(heads if ATTENTION in config.pattern else (0,) * 3), gated), dtype=np.int64
        )
        self._limits = np.array([*config.time_step_limit, config.layer_norm_epsilon], dtype=np.float32)
        self.head = None if config.tie_word_embeddings else cast(PackedLinear, model.lm_head).packed
        """Where the model has one of its own; then `run` can be asked for logits."""
        self.bytes_read = sum(weight.data.numel() for weight in self.weights)
        self._model = [
            self._layers.ctypes.data, len(self._layers), self._linears.ctypes.data, len(self._linears), self._mamba.ctypes.data,
            self._attention.ctypes.data, self._limits.ctypes.data, self._embeddings.data_ptr(),
            0 if self.head is None else self.head.record().ctypes.data,
        ]  # fmt: skip
        self.clock: np.ndarray | None = (
            None  # of executors/cpu/kernels/profiler.py: whoever sets one finds the times of each phase there
        )
        self._rooms: dict[tuple[int, int], _Room] = {}
        self.mamba_columns = (
            2 * config.mamba_inner_size + 2 * config.n_groups * config.ssm_state_size + config.mamba_num_heads
        )

    @property
    def weights(self) -> list[Packed]:
        """The linears, in the order of the layers."""
        return [weight for weight in self._kept if isinstance(weight, Packed)]

    def run(
        self, tokens_T: Tensor, layout: Layout, state: HybridCache, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states [T, E] in bfloat16, and logits [len(wanted), V] in fp32 of these rows, which ascend; brings the state up to
        date. Long batches go through in parts, with the same bits."""
        assert layout.slots is not None and layout.pages is not None
        out_TE = torch.empty(layout.tokens, self.config.hidden_size, dtype=torch.bfloat16)
        logits_WV = torch.empty(len(wanted), self.config.vocab_size if wanted else 0)
        window = CompiledWindow(self, state, layout) if layout.speculative else None
        tokens_T, done = tokens_T.to(torch.int64).contiguous(), 0
        for pieces in calls(layout):
            first = layout.starts[pieces[0].sequence] + pieces[0].offset
            rows = sum(piece.length for piece in pieces)
            chosen = [row - first for row in wanted[done:] if row < first + rows]
            call = _Call(
                pieces,
                rows,
                chosen,
                tokens_T[first:].data_ptr(),
                out_TE[first:].data_ptr(),
                logits_WV[done:].data_ptr(),
            )
            self._call(layout, call, window)
            done += len(chosen)
        if window is not None:
            window.take_back(state)
        return out_TE, logits_WV

    def _call(self, layout: Layout, call: _Call, window: CompiledWindow | None) -> None:
        """One call of the kernel, of pieces of some sequences."""
        assert layout.slots is not None and layout.pages is not None
        pieces = call.pieces
        starts = [0, *accumulate(piece.length for piece in pieces)]
        positions = [layout.positions[piece.sequence] + piece.offset for piece in pieces]
        slots, pages = (
            [layout.slots[piece.sequence] for piece in pieces],
            [layout.pages[piece.sequence] for piece in pieces],
        )
        most = max(map(len, pages))
        kept = [] if window is None else window.places(pieces)
        angles = self._angles(positions, starts)
        numbers = [
            starts,
            slots,
            positions,
            call.chosen,
            kept,
            *(list(owned) + [0] * (most - len(owned)) for owned in pages),
        ]
        words = array("q", chain.from_iterable(numbers))
        base, at = (
            words.buffer_info()[0],
            [8 * place for place in accumulate(map(len, numbers[:5]), initial=0)],
        )
        threads = team.threads(self.bytes_read)
        team.run(
            step.forward, *self._model, *self._room(call.rows, threads).words,
            call.tokens, call.rows, len(pieces), base + at[0], base + at[1], base + at[2], base + at[5], most,
            0 if angles is None else angles.data_ptr(),
            *((0, 0, 0) if window is None else (window.kept.data_ptr(), base + at[4], window.kept.shape[1])),
            call.out, call.logits, base + at[3], len(call.chosen), 0 if self.clock is None else self.clock.ctypes.data,
            size=threads, soon=True,
        )  # fmt: skip

    def feed(self, window: CompiledWindow, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Bring the states of a window's sequences forward by the first tokens of each."""
        layout = window.layout
        assert layout.slots is not None
        numbers = [[of[s] for s in sequences] for of in (window.rows, layout.slots, layout.positions)] + [
            list(counts)
        ]
        words = array("q", chain.from_iterable(numbers))
        base, length = words.buffer_info()[0], 8 * len(sequences)
        threads = team.threads(self.bytes_read)
        team.run(
            step.feed, *self._model, *self._room(max(counts, default=1), threads).words,
            0, 0, len(sequences), base, base + length, base + 2 * length, 0, 0, 0,
            window.kept.data_ptr(), 0, window.kept.shape[1], 0, 0, base + 3 * length, 0, 0,
            size=threads, soon=True,
        )  # fmt: skip

    def _layer(self, block: Any, state: dict[str, Tensor]) -> list[int]:
        """The words of a layer: kind, norm, first linear, then what its kernel reads by `at`."""
        mixer, head = block.mixer, [self._address(block.norm.weight)]
        if isinstance(mixer, Mamba2):
            first = self._linear(*(cast(Any, part).packed for part in (mixer.in_proj, mixer.out_proj)))
            taps = mixer.conv1d.weight.detach()[:, 0].float().T
            vectors = (
                taps,
                mixer.conv1d.bias,
                mixer.dt_bias,
                -mixer.A_log.detach().float().exp(),
                mixer.D,
                mixer.norm.weight,
            )
            at = [state["conv"].data_ptr(), state["ssm"].data_ptr(), *map(self._address, vectors)]
            return [step.KINDS.index(MAMBA), *head, first, *at]
        if isinstance(mixer, Attention):
            parts = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
            first = self._linear(*(cast(Any, part).packed for part in parts))
            norms = (
                [self._address(mixer.q_norm.weight), self._address(mixer.k_norm.weight)]
                if self.config.qk_norm
                else [0, 0]
            )
            return [
                step.KINDS.index(ATTENTION),
                *head,
                first,
                state["key"].data_ptr(),
                state["value"].data_ptr(),
                *norms,
            ]
        assert isinstance(mixer, MLP)
        gate = [mixer.gate_proj] if self.config.mlp_activation == "swiglu" else []
        first = self._linear(*(cast(Any, part).packed for part in (*gate, mixer.up_proj, mixer.down_proj)))
        return [step.KINDS.index(MLP_KIND), *head, first]

    def _linear(self, *weights: Packed) -> int:
        """Add them to the table; the index of the first."""
        first = len(self._records)
        for weight in weights:
            self._kept.append(weight)
            self._records.append(weight.record())
        return first

    def _address(self, vector: Tensor) -> int:
        """Where a copy in fp32 lies, kept as long as this."""
        copy = vector.detach().to(torch.float32, copy=True).contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def _angles(self, positions: Sequence[int], starts: Sequence[int]) -> Tensor | None:
        """cos and sin of half a head, one after the other, [T, P]; None without rotary positions."""
        if self.config.rope_theta is None:
            return None
        each = np.repeat(np.subtract(positions, starts[:-1]), np.diff(starts)) + np.arange(starts[-1])
        half = self.config.head_dim // 2
        cos_TP, sin_TP = rotary_angles(torch.from_numpy(each), self.config.head_dim, self.config.rope_theta)
        return torch.cat([cos_TP[:, :half], sin_TP[:, :half]], dim=1).contiguous()

    def _room(self, rows: int, threads: int) -> _Room:
        """Scratch for so many rows, made once for each power of two of them and each number of threads."""
        size = min(ROWS_AT_ONCE, max(8, 1 << (rows - 1).bit_length()))
        if (size, threads) not in self._rooms:
            every = self.weights if self.head is None else [*self.weights, self.head]
            widest, outputs = max(weight.width for weight in every), int(self._linears[:, OUTPUTS].max())
            projected = max(outputs, int((self._attention[0] + 2 * self._attention[1]) * self._attention[2]))
            fixed = max(weight.fixed_bytes for weight in every)
            private = step.private_size(size, widest, fixed, self._mamba, self._attention)
            many = fixed if size > FEW and any(weight.form != "bf16" for weight in every) else 0
            self._rooms[size, threads] = _Room.make(
                size, self.config.hidden_size, projected, widest, many, private, threads
            )
        return self._rooms[size, threads]


class _Piece(NamedTuple):
    """Some tokens of a sequence, from the `offset`-th of those that the layout brings."""

    sequence: int
    offset: int
    length: int


class _Call(NamedTuple):
    """One call of the kernel: pieces of `rows` tokens in all, which of them want logits, and the addresses of what goes in and out."""

    pieces: list[_Piece]
    rows: int
    chosen: list[int]
    tokens: int
    out: int
    logits: int


def calls(layout: Layout) -> list[list[_Piece]]:
    """A layout cut into calls of at most ROWS_AT_ONCE tokens, in their order."""
    result: list[list[_Piece]] = [[]]
    free = ROWS_AT_ONCE
    for sequence, length in enumerate(layout.lengths):
        offset = 0
        while offset < length:
            if not free:
                result.append([])
                free = ROWS_AT_ONCE
            take = min(length - offset, free)
            result[-1].append(_Piece(sequence, offset, take))
            offset, free = offset + take, free - take
    return result


@dataclass(frozen=True, eq=False)
class _Room:
    """Scratch of one size: residual, projected, normed, rows made integers, shared, and each thread's own."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def make(
        cls, rows: int, hidden: int, projected: int, widest: int, fixed: int, private: int, threads: int
    ) -> _Room:
        packed = torch.zeros(2, rows + 12, widest, dtype=torch.bfloat16)
        own = torch.zeros(threads, private, dtype=torch.uint8)
        integers = torch.zeros(rows + 12, fixed, dtype=torch.uint8)
        return cls(
            (torch.zeros(rows, hidden), torch.zeros(rows, projected), packed[0], integers, packed[1], own)
        )

    @cached_property
    def words(self) -> tuple[int, ...]:
        """As a call of the kernels names them."""
        return (*(tensor.data_ptr() for tensor in self.tensors), self.tensors[-1].shape[1])


class CompiledWindow:
    """The speculative sequences of a layout (model/mixers/draft_tokens.py): states before, and each token's Mamba-2 projections."""

    def __init__(self, forward: CompiledForward, state: HybridCache, layout: Layout) -> None:
        assert layout.slots is not None
        self.forward, self.layout = forward, layout
        self.rows: dict[int, int] = {}  # by sequence, where among `kept` its tokens begin
        count = 0
        for sequence in layout.speculative:
            self.rows[sequence] = count
            count += layout.lengths[sequence]
        self.kept = torch.empty(forward.config.pattern.count(MAMBA), count, forward.mamba_columns)
        self._slots = [layout.slots[sequence] for sequence in layout.speculative]
        self._before = [pool[self._slots] for pool in state.slot_pools]

    def places(self, pieces: Sequence[_Piece]) -> list[int]:
        """For each row of a call, where among `kept` its projections go: -1 for what is no window's."""
        places: list[int] = []
        for sequence, offset, length in pieces:
            first = self.rows.get(sequence)
            places += [-1] * length if first is None else range(first + offset, first + offset + length)
        return places

    def take_back(self, state: HybridCache) -> None:
        """The states as they were; whatever stays is fed to them by `settle`."""
        for pool, before in zip(state.slot_pools, self._before, strict=True):
            pool[self._slots] = before
        state.layers[0].window = self

    def settle(self, pools: dict[str, Tensor], rows: Sequence[int], counts: Sequence[int]) -> None:
        """As model/mixers/draft_tokens.py's, for all layers at once."""
        self.forward.feed(self, [self.layout.speculative[row] for row in rows], counts)
