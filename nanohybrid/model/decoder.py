"""The decode step as one kernel: a packed model and its state as the tables that ops/cpu/step.py reads.

B sequences with one token each · E embedding · V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nanohybrid.model.attention import Attention, rotary_angles
from nanohybrid.model.lm import HybridLM
from nanohybrid.model.mamba2 import Mamba2
from nanohybrid.model.mlp import MLP
from nanohybrid.model.packed import PackedLinear
from nanohybrid.model.state import State
from nanohybrid.ops.cpu.packed import Packed, pack
from nanohybrid.ops.cpu.step import KINDS, LAYERS, decode, private_size
from nanohybrid.ops.cpu.team import run
from nanohybrid.ops.layout import Layout


class Decoder:
    """Steps of one packed model (model/packed.py) over one state. It reads their memory where it lies: neither may be moved."""

    def __init__(self, model: HybridLM, state: State) -> None:
        self.model, self.state, self.config = model, state, model.config
        self._kept: list[Tensor | Packed] = []  # what only the tables point to
        self._records: list[np.ndarray] = []
        rows = [self._layer(block.norm.weight, block.mixer, state.layers[i]) for i, block in enumerate(model.backbone.layers)]
        tied = model.config.tie_word_embeddings
        head = pack(model.backbone.embeddings.weight.detach()) if tied else cast(PackedLinear, model.lm_head).packed
        rows.append([0, self._address(model.backbone.norm_f.weight), self._linear(head)])
        self._layers = np.zeros((len(rows), len(LAYERS)), dtype=np.int64)
        for index, row in enumerate(rows):
            self._layers[index, : len(row)] = row
        self._linears = np.stack(self._records)
        c = self.config
        self._mamba = np.array([c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel], dtype=np.int64)
        gated = c.mlp_activation == "swiglu"
        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        self._attention = np.array([*heads, state.page_size, gated], dtype=np.int64)
        self._limits = np.array([*c.time_step_limit, c.layer_norm_epsilon], dtype=np.float32)
        self._rooms: dict[int, dict[str, Tensor]] = {}

    def logits(self, tokens: list[int], layout: Layout) -> Tensor:
        """Logits [B, V] in fp32 of one token for each sequence of a decode layout (`is_decode`); updates the state."""
        assert layout.slots is not None and layout.pages is not None
        batch = len(tokens)
        room = self._room(batch)
        positions = np.array(layout.positions, dtype=np.int64)
        pages = np.zeros((batch, max(1, max(map(len, layout.pages)))), dtype=np.int64)
        for row, owned in enumerate(layout.pages):
            pages[row, : len(owned)] = owned
        angles = self._angles(positions)
        logits = torch.empty(batch, self.config.vocab_size)
        run(
            decode, self._layers, self._linears, self._mamba, self._attention, self._limits,
            self.model.backbone.embeddings.weight.data_ptr(), np.array(tokens, dtype=np.int64), np.array(layout.slots, dtype=np.int64),
            positions, pages, 0 if angles is None else angles.data_ptr(), room["residual"].data_ptr(), room["projected"].data_ptr(),
            room["shared"].data_ptr(), room["private"].data_ptr(), room["private"].shape[1], logits.data_ptr(),
        )  # fmt: skip
        return logits

    def _layer(self, norm: Tensor, mixer: Any, state: dict[str, Tensor]) -> list[int]:
        """The words of a layer: kind, norm, first linear, then what its kernel reads by `at`."""
        head = [self._address(norm)]
        if isinstance(mixer, Mamba2):
            first = self._linear(mixer.in_proj.packed, mixer.out_proj.packed)  # type: ignore[union-attr]
            taps = mixer.conv1d.weight.detach()[:, 0].float().T
            vectors = (taps, mixer.conv1d.bias, mixer.dt_bias, -mixer.A_log.detach().float().exp(), mixer.D, mixer.norm.weight)
            at = [state["conv"].data_ptr(), state["ssm"].data_ptr(), *map(self._address, vectors)]
            return [KINDS.index("M"), *head, first, *at]
        if isinstance(mixer, Attention):
            parts = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
            first = self._linear(*(cast(Any, part).packed for part in parts))
            norms = [self._address(mixer.q_norm.weight), self._address(mixer.k_norm.weight)] if self.config.qk_norm else [0, 0]
            return [KINDS.index("*"), *head, first, state["key"].data_ptr(), state["value"].data_ptr(), *norms]
        assert isinstance(mixer, MLP)
        gate = [mixer.gate_proj] if self.config.mlp_activation == "swiglu" else []
        first = self._linear(*(cast(Any, part).packed for part in (*gate, mixer.up_proj, mixer.down_proj)))
        return [KINDS.index("-"), *head, first]

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

    def _angles(self, positions: np.ndarray) -> Tensor | None:
        """cos and sin of half a head, one after the other, [B, P]; None without rotary positions."""
        if self.config.rope_theta is None:
            return None
        half = self.config.head_dim // 2
        cos_BP, sin_BP = rotary_angles(torch.from_numpy(positions), self.config.head_dim, self.config.rope_theta)
        return torch.cat([cos_BP[:, :half], sin_BP[:, :half]], dim=1).contiguous()

    def _room(self, batch: int) -> dict[str, Tensor]:
        """Scratch for a batch of this size, made once; batches of up to 16 more share it."""
        rows = -(-batch // 16) * 16 + 8
        if rows not in self._rooms:
            widths, outputs = self._linears[:, 3].max(), self._linears[:-1, 1].max()
            attention = self._attention if "*" in self.config.pattern else self._attention * 0
            mamba = self._mamba if "M" in self.config.pattern else self._mamba * 0
            projected = max(int(outputs), int(attention[0] + 2 * attention[1]) * int(attention[2]))
            each = private_size(rows, int(self._linears[-1, 3]), mamba, attention)
            self._rooms = {rows: {
                "residual": torch.zeros(rows, self.config.hidden_size),
                "projected": torch.zeros(rows, projected),
                "shared": torch.zeros(rows + 12, int(widths), dtype=torch.bfloat16),
                "private": torch.zeros(torch.get_num_threads(), each, dtype=torch.uint8),
            }}  # fmt: skip
        return self._rooms[rows]
