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

from nanohybrid.ops.layout import CHUNK, Layout


def ssd_scan(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, C_TGN: Tensor, D_H: Tensor, layout: Layout, initial_SHPN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_THP in the dtype of dt, and the final states."""
    plan = layout.plan(CHUNK)
    states = _States(initial_SHPN, (layout.sequences, *x_THP.shape[1:], B_TGN.shape[-1]), dt_TH)
    ys = []
    with torch.autocast(x_THP.device.type, enabled=False):
        for block, x, dt, B, C in zip(plan.blocks, plan.split(x_THP), plan.split(dt_TH), plan.split(B_TGN), plan.split(C_TGN), strict=True):
            x, B, C = x.to(dt.dtype), B.to(dt.dtype), C.to(dt.dtype)
            y, state = scan_chunk(x, dt, A_H, B, C, states.read(block.sequences))
            ys.append(torch.addcmul(y, D_H[:, None], x))
            states.write(block.sequences, state)
    return plan.join(ys), states.all()


def scan_chunk(x: Tensor, dt: Tensor, A_H: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One chunk of Z pieces: x [Z, Q, H, P], dt [Z, Q, H], B and C [Z, Q, G, N], state [Z, H, P, N] or None for zeros.

    Returns y without the skip term D x, [Z, Q, H, P], and the state that leaves the chunk. Padded tokens have dt = 0, which
    neither decays nor feeds the state.
    """
    (Z, Q, H, P), (G, N) = x.shape, B.shape[2:]
    # 1. decay from every token j to every later token i; masked before exp, so that nothing overflows
    c_ZHQ = (dt * A_H).transpose(1, 2).cumsum(-1)
    later = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay_ZHQQ = (c_ZHQ[..., :, None] - c_ZHQ[..., None, :]).masked_fill_(later, float("-inf")).exp()
    # 2. what token i reads of token j: once for a group, weighed for each of its heads
    scores_ZGQQ = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)
    mixing_ZHQQ = (decay_ZHQQ.view(Z, G, H // G, Q, Q) * scores_ZGQQ[:, :, None]).view(Z, H, Q, Q)
    fed_ZHQP = (x * dt[..., None]).transpose(1, 2)
    y_ZHQP = mixing_ZHQQ @ fed_ZHQP
    # 3. what the chunk leaves behind
    kept_ZHQ = (c_ZHQ[..., -1:] - c_ZHQ).exp()
    left_ZGQM = (fed_ZHQP * kept_ZHQ[..., None]).view(Z, G, H // G, Q, P).transpose(2, 3).reshape(Z, G, Q, -1)
    new_ZHPN = (left_ZGQM.transpose(2, 3) @ B.transpose(1, 2)).view(Z, H, P, N)
    if state is None:
        return y_ZHQP.transpose(1, 2), new_ZHPN
    # 4. what it was given: read by every token, decayed into the state
    read_ZGQM = C.transpose(1, 2) @ state.view(Z, G, -1, N).transpose(2, 3)
    read_ZHQP = read_ZGQM.view(Z, G, Q, H // G, P).transpose(2, 3).reshape(Z, H, Q, P)
    y_ZHQP = torch.addcmul(y_ZHQP, c_ZHQ.exp()[..., None], read_ZHQP)
    return y_ZHQP.transpose(1, 2), torch.addcmul(new_ZHPN, c_ZHQ[..., -1, None, None].exp(), state)


class _States:
    """The state of each sequence between rounds; None stands for zeros, so that short documents pay for none."""

    def __init__(self, initial: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
        self._shape, self._like = shape, like
        self._rows: list[Tensor | None] = list(initial.to(like.dtype).unbind(0)) if initial is not None else [None] * shape[0]
        self._whole: tuple[tuple[int, ...], Tensor] | None = None  # the last block written, as it is

    def read(self, sequences: tuple[int, ...]) -> Tensor | None:
        if self._whole is not None and self._whole[0] == sequences:
            return self._whole[1]
        rows = [self._rows[i] for i in sequences]
        if all(row is None for row in rows):
            return None
        return torch.stack([row if row is not None else self._like.new_zeros(self._shape[1:]) for row in rows])

    def write(self, sequences: tuple[int, ...], state: Tensor) -> None:
        self._whole = (sequences, state)
        for i, row in zip(sequences, state.unbind(0), strict=True):
            self._rows[i] = row

    def all(self) -> Tensor:
        state = self.read(tuple(range(self._shape[0])))
        return self._like.new_zeros(self._shape) if state is None else state
