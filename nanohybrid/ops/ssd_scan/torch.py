"""The SSD scan as matrix products over chunks of 128 tokens (Dao & Gu 2024, section 6), in plain torch on any device.

Inside a chunk the recurrence unrolls to   y_i = sum_{j <= i} exp(c_i - c_j) (C_i . B_j) dt_j x_j + exp(c_i) S C_i + D x_i
with c the running sum of dt A, and the state that leaves it is   S' = exp(c_Q) S + sum_j exp(c_Q - c_j) dt_j x_j B_j^T.
Chunks of one sequence follow one another; chunks of different sequences run side by side. Transient memory is that of one
round of chunks, whatever the length. Chunks end at multiples of 128 of the absolute position, so that the same sums are made
in the same order however a prompt was cut.

Z pieces side by side · Q chunk length · H heads · P head dimension · G groups · N state size · S sequences · T tokens.
"""

import torch
from torch import Tensor

from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan.chunk import Chunk


def ssd_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    D_H: Tensor,
    layout: Layout,
    initial_SHPN: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y_THP in the dtype of dt, and the final states (None unless `keep`)."""
    plan = layout.plan(CHUNK)
    states = _States(initial_SHPN, (layout.sequences, *x_THP.shape[1:], B_TGN.shape[-1]), dt_TH)
    ys = []
    with torch.autocast(x_THP.device.type, enabled=False):
        for block, x, dt, B, C in zip(
            plan.blocks,
            plan.split(x_THP),
            plan.split(dt_TH),
            plan.split(B_TGN),
            plan.split(C_TGN),
            strict=True,
        ):
            x, B, C = x.to(dt.dtype), B.to(dt.dtype), C.to(dt.dtype)
            leaves = keep or not block.last
            y, state = Chunk.apply(x, dt, A_H, B, C, D_H, states.read(block.sequences), leaves)
            ys.append(y)
            if leaves:
                states.write(block.sequences, state)
    return plan.join(ys), states.all() if keep else None


class _States:
    """The state of each sequence between rounds; None stands for zeros, so that short documents pay for none."""

    def __init__(self, initial: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
        self._shape, self._like = shape, like
        self._rows: list[Tensor | None] = (
            list(initial.to(like.dtype).unbind(0)) if initial is not None else [None] * shape[0]
        )
        self._whole: tuple[tuple[int, ...], Tensor] | None = None  # the last block written, as it is

    def read(self, sequences: tuple[int, ...]) -> Tensor | None:
        if self._whole is not None and self._whole[0] == sequences:
            return self._whole[1]
        rows = [self._rows[i] for i in sequences]
        if all(row is None for row in rows):
            return None
        return torch.stack(
            [row if row is not None else self._like.new_zeros(self._shape[1:]) for row in rows]
        )

    def write(self, sequences: tuple[int, ...], state: Tensor) -> None:
        self._whole = (sequences, state)
        for i, row in zip(sequences, state.unbind(0), strict=True):
            self._rows[i] = row

    def all(self) -> Tensor:
        state = self.read(tuple(range(self._shape[0])))
        return self._like.new_zeros(self._shape) if state is None else state
