"""The SSD scan as matrix products over chunks of 128 tokens (Dao & Gu 2024, section 6), in torch.

Inside a chunk the recurrence unrolls to   y_i = sum_{j <= i} exp(c_i - c_j) (C_i . B_j) dt_j x_j + exp(c_i) S
C_i + D x_i with c the running sum of dt A, and the state after it is   S' = exp(c_Q) S + sum_j exp(c_Q - c_j)
dt_j x_j B_j^T.

Chunks of one sequence follow one another; chunks of different sequences are computed side by side. Transient
memory is that of one round of chunks, whatever the length. Chunks end at multiples of 128 of the absolute
position, so the same sums are computed in the same order however a prompt was cut into calls.

Z chunks side by side · Q chunk length · H heads · P head dimension · G groups · N state size · S sequences ·
T tokens.
"""

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan.chunk import Chunk
from nanohybrid.ops.ssd_scan.inputs import SSDInputs


def ssd_scan(
    inputs: SSDInputs, layout: Layout, output_final_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """y_THP in the dtype of dt, and the final states (None unless `output_final_state`)."""
    x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN = inputs
    plan = layout.plan(CHUNK)
    states = _States(initial_SHPN, (layout.sequences, *x_THP.shape[1:], B_TGN.shape[-1]), dt_TH)
    ys, parts = [], (plan.split(tensor) for tensor in (x_THP, dt_TH, B_TGN, C_TGN))
    with torch.autocast(x_THP.device.type, enabled=False):
        for block, x, dt, B, C in zip(plan.blocks, *parts, strict=True):
            x, B, C = x.to(dt.dtype), B.to(dt.dtype), C.to(dt.dtype)
            has_next = output_final_state or not block.last
            y, state = Chunk.apply(x, dt, A_H, B, C, D_H, states.read(block.sequences), has_next)
            ys.append(y)
            if has_next:
                states.write(block.sequences, state)
    return plan.join(ys), states.all() if output_final_state else None


class _States:
    """The state of each sequence between rounds; None stands for zeros, so short documents allocate none."""

    def __init__(self, initial: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
        self._shape, self._like = shape, like
        self._rows: list[Tensor | None] = (
            list(initial.to(like.dtype).unbind(0)) if initial is not None else [None] * shape[0]
        )
        self._last: tuple[tuple[int, ...], Tensor] | None = None  # the last block written, not unbound

    def read(self, sequences: tuple[int, ...]) -> Tensor | None:
        """The states of these sequences, stacked; None where all are zeros."""
        if self._last is not None and self._last[0] == sequences:
            return self._last[1]
        rows = [self._rows[i] for i in sequences]
        if all(row is None for row in rows):
            return None
        return torch.stack(
            [row if row is not None else self._like.new_zeros(self._shape[1:]) for row in rows]
        )

    def write(self, sequences: tuple[int, ...], state: Tensor) -> None:
        """Store the states of these sequences."""
        self._last = (sequences, state)
        for i, row in zip(sequences, state.unbind(0), strict=True):
            self._rows[i] = row

    def all(self) -> Tensor:
        """The states of all sequences."""
        state = self.read(tuple(range(self._shape[0])))
        return self._like.new_zeros(self._shape) if state is None else state
