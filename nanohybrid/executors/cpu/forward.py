"""The CPU executor: the whole forward of a packed model as one kernel call (kernels/forward.py).

T tokens · E hidden size · P head dimension · V vocabulary · W rows whose logits are wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from nanohybrid.executors.cpu.drafts import CpuDrafts
from nanohybrid.executors.cpu.kernels import call as words
from nanohybrid.executors.cpu.kernels import forward as kernels
from nanohybrid.executors.cpu.kernels.gemm import MAX_ROWS, OUTPUTS, REPLICATED_ROWS
from nanohybrid.executors.cpu.kernels.packing import Packed
from nanohybrid.executors.cpu.weights import PackedLinear
from nanohybrid.executors.executor import Executor
from nanohybrid.model.cache import HybridCache
from nanohybrid.model.layer_cache import LayerCache
from nanohybrid.model.lm import HybridLM
from nanohybrid.model.mixers import CpuKernel
from nanohybrid.model.mixers.rope import inverse_frequencies, rotary_angles
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.numba import threads
from nanohybrid.ops.sizes import PAGE

CACHE_DTYPES = {"conv": torch.bfloat16, "ssm": torch.float32, "key": torch.bfloat16, "value": torch.bfloat16}
MEMORY: dict[str, type[Any]] = {"mamba2": words.MambaMemory, "attention": words.AttentionMemory}
"""The struct of addresses that a kernel reads; the others read none."""


class CpuExecutor(Executor):
    """Runs one packed model (weights.py) over one cache, whose memory it reads and writes in place.

    Inside a page, keys and values lie in an order of their own (kernels/kv_cache.py), which nothing else
    reads. Every sum has one order, so results have the same bits in any batch and for any cut into calls.
    """

    name = "cpu"

    @classmethod
    def holds(cls, model: HybridLM, cache: HybridCache) -> bool:
        """Whether the kernels can use this cache: its dtypes are theirs, and its pages of their size."""
        tensors = (pair for layer in cache.layers for pair in layer.items())
        dtypes = all(CACHE_DTYPES.get(name) == pool.dtype for name, pool in tensors)
        return dtypes and cache.page_size == PAGE

    def __init__(self, model: HybridLM, cache: HybridCache) -> None:
        super().__init__(model, cache)
        cache.claim("panels")
        self.config = config = model.config
        self.is_batch_invariant = not config.tie_word_embeddings  # else torch computes the logits
        self._tensors: list[Tensor] = []  # keeps alive what only the tables point to
        self.weights: list[Packed] = []  # the linears, in the order of the layers
        self._kernels: list[str] = []  # of the layers, in order
        layers = zip(list(model.backbone.layers), cache.layers, strict=True)
        rows = [self._layer(block, memory) for block, memory in layers]
        rows.append(words.Layer(kernel=0, norm=self._address(model.backbone.norm_f.weight), first_linear=0))
        self._layers = np.zeros((len(rows), words.LAYER_WORDS), dtype=np.int64)
        for index, row in enumerate(rows):
            self._layers[index, : len(row)] = row
        self._linears = np.stack([weight.record() for weight in self.weights])
        self._mamba = np.array(self._mamba_sizes(), dtype=np.int64)
        self._attention = np.array(self._attention_sizes(), dtype=np.int64)
        self._limits = np.array([*config.time_step_limit, config.layer_norm_epsilon], dtype=np.float32)
        self.head = None if config.tie_word_embeddings else cast(PackedLinear, model.lm_head).packed
        self.bytes_read = sum(weight.data.numel() for weight in self.weights)
        self.profile: np.ndarray | None = None  # counters of kernels/profiler.py, where they are set
        self._scratch: dict[tuple[int, int], _Scratch] = {}
        self._model_words = {
            "layers": self._layers.ctypes.data,
            "layer_count": len(self._layers),
            "linears": self._linears.ctypes.data,
            "linear_count": len(self._linears),
            "mamba": self._mamba.ctypes.data,
            "attention": self._attention.ctypes.data,
            "limits": self._limits.ctypes.data,
            "embeddings": model.backbone.embeddings.weight.data_ptr(),
            "head": 0 if self.head is None else self.head.record().ctypes.data,
        }

    def run(self, tokens_T: Tensor, layout: Layout, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As Executor.run; hidden states are bfloat16.

        Long batches go through in parts, with the same bits.
        """
        if layout.slots is None or layout.pages is None:
            raise ValueError("an executor needs a layout with slots and pages")
        chosen = wanted if self.head is not None else ()
        out_TE = torch.empty(layout.tokens, self.config.hidden_size, dtype=torch.bfloat16)
        logits_WV = torch.empty(len(chosen), self.config.vocab_size if chosen else 0)
        drafts = CpuDrafts(self, self.cache, layout) if layout.speculative else None
        tokens_T, done = tokens_T.to(torch.int64).contiguous(), 0
        for parts in split_layout(layout):
            first = layout.starts[parts[0].sequence] + parts[0].offset
            rows = sum(part.length for part in parts)
            here = [row - first for row in chosen[done:] if row < first + rows]
            addresses = (tokens_T[first:].data_ptr(), out_TE[first:].data_ptr(), logits_WV[done:].data_ptr())
            self._call(layout, parts, rows, here, addresses, drafts)
            done += len(here)
        if drafts is not None:
            drafts.roll_back(self.cache)
        if self.head is None and wanted:
            every = len(wanted) == layout.tokens
            logits_WV = self.model.head(out_TE if every else out_TE[torch.tensor(list(wanted))])
        return out_TE, logits_WV

    def _call(
        self,
        layout: Layout,
        parts: list[Part],
        rows: int,
        wanted: list[int],
        addresses: tuple[int, int, int],
        drafts: CpuDrafts | None,
    ) -> None:
        """One call of the kernel, on parts of some sequences. addresses: of ids, hidden states and logits."""
        slots, pages = (
            cast("tuple[int, ...]", layout.slots),
            cast("tuple[tuple[int, ...], ...]", layout.pages),
        )
        starts = [0, *accumulate(part.length for part in parts)]
        positions = [layout.positions[part.sequence] + part.offset for part in parts]
        owned = [pages[part.sequence] for part in parts]
        most = max(map(len, owned))
        draft_rows = [] if drafts is None else drafts.places(parts)
        angles = self._angles(positions, starts)
        tables = [starts, [slots[part.sequence] for part in parts], positions, wanted, draft_rows]
        tables += [list(pages) + [0] * (most - len(pages)) for pages in owned]
        numbers = array("q", chain.from_iterable(tables))
        base = numbers.buffer_info()[0]
        at = [base + 8 * place for place in accumulate(map(len, tables[:5]), initial=0)]
        size = threads.num_threads(self.bytes_read)
        tokens, out, logits = addresses
        call = words.Call(
            **self._model_words, **self._scratch_for(rows, size).words,
            tokens=tokens, rows=rows, sequences=len(parts), starts=at[0], slots=at[1], positions=at[2],
            pages=at[5],
            pages_per_sequence=most, angles=0 if angles is None else angles.data_ptr(),
            draft_inputs=0 if drafts is None else drafts.inputs.data_ptr(),
            draft_rows=0 if drafts is None else at[4],
            draft_count=0 if drafts is None else drafts.inputs.shape[1],
            out=out, logits=logits, wanted_rows=at[3], wanted_count=len(wanted),
            profile=0 if self.profile is None else self.profile.ctypes.data,
        )  # fmt: skip
        threads.run(kernels.forward, *call, size=size, keep_spinning=True)

    def advance(self, drafts: CpuDrafts, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Advance the recurrent states of these sequences by the first counts[i] draft tokens of each."""
        layout = drafts.layout
        slots = cast("tuple[int, ...]", layout.slots)
        tables = [
            [drafts.first_rows[s] for s in sequences],
            [slots[s] for s in sequences],
            [layout.positions[s] for s in sequences],
            list(counts),
        ]
        numbers = array("q", chain.from_iterable(tables))
        base, length = numbers.buffer_info()[0], 8 * len(sequences)
        size = threads.num_threads(self.bytes_read)
        call = words.Call(
            **self._model_words, **self._scratch_for(max(counts, default=1), size).words,
            tokens=0, rows=0, sequences=len(sequences), starts=base, slots=base + length,
            positions=base + 2 * length,
            pages=0, pages_per_sequence=0, angles=0,
            draft_inputs=drafts.inputs.data_ptr(), draft_rows=0, draft_count=drafts.inputs.shape[1],
            out=0, logits=0, wanted_rows=base + 3 * length, wanted_count=0, profile=0,
        )  # fmt: skip
        threads.run(kernels.advance, *call, size=size, keep_spinning=True)

    def _layer(self, block: Any, cache: LayerCache) -> tuple[int, ...]:
        """A row of the table of layers. Raises ValueError where no kernel computes the layer."""
        plan: CpuKernel | None = block.mixer.cpu_kernel()
        if plan is None:
            raise ValueError(f"the CPU kernels cannot compute a {block.mixer.label} layer")
        self._kernels.append(plan.name)
        first = len(self.weights)
        self.weights += [block.mixer.get_submodule(name).packed for name in plan.linears]
        addresses = [cache[name].data_ptr() for name in plan.cache]
        addresses += [0 if vector is None else self._address(vector) for vector in plan.vectors]
        memory = MEMORY[plan.name](*addresses) if plan.name in MEMORY else ()
        return (
            *words.Layer(words.KERNELS.index(plan.name), self._address(block.norm.weight), first),
            *memory,
        )

    @property
    def recurrent_layers(self) -> int:
        """How many layers have a recurrent state."""
        return self._kernels.count("mamba2")

    def _mamba_sizes(self) -> words.MambaSizes:
        config = self.config
        if "mamba2" not in self._kernels:
            return words.MambaSizes(0, 0, 0, 0, 0)
        return words.MambaSizes(
            heads=config.mamba_num_heads, head_dim=config.mamba_head_dim, groups=config.n_groups,
            state_size=config.ssm_state_size, conv_kernel=config.conv_kernel,
        )  # fmt: skip

    def _attention_sizes(self) -> words.AttentionSizes:
        config = self.config
        if "attention" not in self._kernels:
            return words.AttentionSizes(0, 0, 0)
        return words.AttentionSizes(config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def _address(self, vector: Tensor) -> int:
        """The address of a copy in fp32, which lives as long as this executor."""
        copy = vector.detach().to(torch.float32, copy=True).contiguous()
        self._tensors.append(copy)
        return copy.data_ptr()

    def _angles(self, positions: Sequence[int], starts: Sequence[int]) -> Tensor | None:
        """cos and sin of half a head, one after the other, [T, P]; None without rotary positions."""
        if self.config.rope_theta is None:
            return None
        each = np.repeat(np.subtract(positions, starts[:-1]), np.diff(starts)) + np.arange(starts[-1])
        half, scaling = self.config.head_dim // 2, self.config.rope_scaling
        scale = 1.0 if scaling is None else scaling.attention_scale
        cos_TP, sin_TP = rotary_angles(torch.from_numpy(each), self._frequencies, scale)
        return torch.cat([cos_TP[:, :half], sin_TP[:, :half]], dim=1).contiguous()

    @cached_property
    def _frequencies(self) -> Tensor:
        """Inverse frequencies of the rotary positions, [P/2]."""
        assert self.config.rope_theta is not None
        return inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def _scratch_for(self, rows: int, num_threads: int) -> _Scratch:
        """Scratch memory for a number of rows, allocated once per power of two and number of threads."""
        size = min(MAX_ROWS, max(8, 1 << (rows - 1).bit_length()))
        if (size, num_threads) not in self._scratch:
            every = self.weights if self.head is None else [*self.weights, self.head]
            widest, outputs = max(weight.width for weight in every), int(self._linears[:, OUTPUTS].max())
            heads = self._attention_sizes()
            projected = max(outputs, (heads.heads + 2 * heads.kv_heads) * heads.head_dim)
            row_bytes = max(weight.quantized_row_bytes for weight in every)
            private = kernels.private_size(size, widest, row_bytes, self._mamba, self._attention)
            quantized = size > REPLICATED_ROWS and any(weight.format != "bf16" for weight in every)
            sizes = (
                size,
                self.config.hidden_size,
                projected,
                widest,
                row_bytes if quantized else 0,
                private,
                num_threads,
            )
            self._scratch[size, num_threads] = _Scratch.make(*sizes)
        return self._scratch[size, num_threads]


class Part(NamedTuple):
    """`length` tokens of a sequence, from the `offset`-th of those that the layout brings."""

    sequence: int
    offset: int
    length: int


def split_layout(layout: Layout) -> list[list[Part]]:
    """A layout cut into calls of at most MAX_ROWS tokens, in their order."""
    result: list[list[Part]] = [[]]
    free = MAX_ROWS
    for sequence, length in enumerate(layout.lengths):
        offset = 0
        while offset < length:
            if not free:
                result.append([])
                free = MAX_ROWS
            taken = min(length - offset, free)
            result[-1].append(Part(sequence, offset, taken))
            offset, free = offset + taken, free - taken
    return result


@dataclass(frozen=True, eq=False)
class _Scratch:
    """Scratch memory of one size, under the names of call.Call."""

    residual: Tensor
    projected: Tensor
    normed: Tensor
    quantized: Tensor
    mixed: Tensor
    private: Tensor

    @classmethod
    def make(
        cls,
        rows: int,
        hidden: int,
        projected: int,
        widest: int,
        row_bytes: int,
        private: int,
        num_threads: int,
    ) -> _Scratch:
        packed = torch.zeros(2, rows + 12, widest, dtype=torch.bfloat16)
        return cls(
            residual=torch.zeros(rows, hidden),
            projected=torch.zeros(rows, projected),
            normed=packed[0],
            quantized=torch.zeros(rows + 12, row_bytes, dtype=torch.uint8),
            mixed=packed[1],
            private=torch.zeros(num_threads, private, dtype=torch.uint8),
        )

    @cached_property
    def words(self) -> dict[str, int]:
        """The words of a call that name this memory."""
        addresses = {
            name: tensor.data_ptr() for name, tensor in vars(self).items() if isinstance(tensor, Tensor)
        }
        return addresses | {"private_bytes": self.private.shape[1]}
