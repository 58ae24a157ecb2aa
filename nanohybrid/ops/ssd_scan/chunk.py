"""One chunk of the SSD scan and its gradient, as matrix products (Dao & Gu 2024, section 6).

With c the running sum of dt A inside the chunk and f_j = dt_j x_j the recurrence unrolls to

    y_i = sum_{j <= i} exp(c_i - c_j) (C_i . B_j) f_j + exp(c_i) S C_i + D x_i
    S'  = exp(c_Q) S + sum_j exp(c_Q - c_j) f_j B_j^T

The gradient is written by hand, because autograd's makes three times as many passes over the [Q, Q] matrices.
It uses that every use of c_i multiplies a term of y_i, every use of -c_j a term with f_j, and c_Q all of S'.
So

    dc_i = dy_i . (y_i - D x_i) - df_i . f_i        dc_Q also gets dS' . S'

Z chunks side by side · Q chunk length · H heads · P head dimension · G groups · M heads of a group times P ·
N state size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Chunk(torch.autograd.Function):
    """x [Z, Q, H, P], dt [Z, Q, H], A and D [H], B and C [Z, Q, G, N], state [Z, H, P, N] or None for zeros.

    Returns y [Z, Q, H, P] and the state after the chunk, None unless `has_next`. Padded tokens have x = 0 and
    dt = 0, which neither decay the state nor add to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A_H: Tensor,
        B: Tensor,
        C: Tensor,
        D_H: Tensor,
        state: Tensor | None,
        has_next: bool,
    ) -> Any:
        (Z, Q, H, P), (G, N) = x.shape, B.shape[2:]
        # 1. decay from every token j to every later token i; masked before exp to avoid overflow
        c_ZHQ = (dt * A_H).transpose(1, 2).cumsum(-1)
        decay_ZHQQ = c_ZHQ[..., :, None] - c_ZHQ[..., None, :]
        decay_ZHQQ.masked_fill_(_is_later(Q, x.device), float("-inf")).exp_()
        # 2. scores of tokens i and j: once for a group, weighted for each of its heads
        B_ZGQN, C_ZGQN = _heads_first(B), _heads_first(C)
        scores_ZGQQ = C_ZGQN @ B_ZGQN.transpose(2, 3)
        f_ZHQP = _heads_first(x, dt[..., None])
        y_ZHQP = _weighted_scores(decay_ZHQQ, scores_ZGQQ) @ f_ZHQP
        # 3. what the chunk adds to the state, where another chunk follows
        next_ZHPN = None
        if has_next:
            added_ZGQM = _grouped(f_ZHQP * _decay_to_end(c_ZHQ), G)
            next_ZHPN = (added_ZGQM.transpose(2, 3) @ B_ZGQN).view(Z, H, P, N)
        # 4. the given state: read by every token, decayed into the next state
        if state is not None:
            read_ZGQM = C_ZGQN @ state.reshape(Z, G, -1, N).transpose(2, 3)
            y_ZHQP.addcmul_(c_ZHQ.exp()[..., None], _ungrouped(read_ZGQM, H))
            if next_ZHPN is not None:
                next_ZHPN.addcmul_(c_ZHQ[..., -1, None, None].exp(), state)

        # A state that is not used gets no gradient, and no products with zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, dt, A_H, D_H, B_ZGQN, C_ZGQN, state, c_ZHQ, decay_ZHQQ, scores_ZGQQ, y_ZHQP, next_ZHPN
        )
        return (x * D_H[:, None]).add_(y_ZHQP.transpose(1, 2)), next_ZHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dnext_ZHPN: Tensor | None):  # type: ignore[no-untyped-def]
        x, dt, A_H, D_H, B_ZGQN, C_ZGQN, state, c_ZHQ, decay_ZHQQ, scores_ZGQQ, y_ZHQP, next_ZHPN = (
            ctx.saved_tensors
        )
        (Z, Q, H, P), (G, N) = x.shape, B_ZGQN.shape[1::2]
        dy = torch.zeros_like(x) if dy is None else dy
        dy_ZHQP, f_ZHQP = _heads_first(dy), _heads_first(x, dt[..., None])
        # 1. through the products inside the chunk
        df_ZHQP = _weighted_scores(decay_ZHQQ, scores_ZGQQ).transpose(2, 3) @ dy_ZHQP
        dscores_ZGQQ = (dy_ZHQP @ f_ZHQP.transpose(2, 3)).mul_(decay_ZHQQ).view(Z, G, H // G, Q, Q).sum(2)
        dC_ZGQN, dB_ZGQN = dscores_ZGQQ @ B_ZGQN, dscores_ZGQQ.transpose(2, 3) @ C_ZGQN
        # 2. through the next state
        if dnext_ZHPN is not None:
            dnext_ZGMN, to_end_ZHQ1 = dnext_ZHPN.reshape(Z, G, -1, N), _decay_to_end(c_ZHQ)
            df_ZHQP.addcmul_(to_end_ZHQ1, _ungrouped(B_ZGQN @ dnext_ZGMN.transpose(2, 3), H))
            dB_ZGQN.add_(_grouped(f_ZHQP * to_end_ZHQ1, G) @ dnext_ZGMN)
        # 3. through the given state
        dstate = None
        if state is not None:
            dread_ZGQM = _grouped(dy_ZHQP * c_ZHQ.exp()[..., None], G)
            dC_ZGQN.add_(dread_ZGQM @ state.reshape(Z, G, -1, N))
            dstate = (dread_ZGQM.transpose(2, 3) @ C_ZGQN).view(Z, H, P, N)
            if dnext_ZHPN is not None:
                dstate.addcmul_(c_ZHQ[..., -1, None, None].exp(), dnext_ZHPN)
        # 4. through the decay: dc, then its running sum from the end
        dt_ZHQ, x_ZHQP = dt.transpose(1, 2), x.transpose(1, 2)
        x_df_ZHQ = (df_ZHQP * x_ZHQP).sum(-1)
        dc_ZHQ = (dy_ZHQP * y_ZHQP).sum(-1) - x_df_ZHQ * dt_ZHQ
        if dnext_ZHPN is not None:
            dc_ZHQ[..., -1] += (dnext_ZHPN * next_ZHPN).sum((-1, -2))
        dlog_ZHQ = dc_ZHQ.flip(-1).cumsum(-1).flip(-1)
        # 5. through the inputs
        ddt_ZHQ = torch.addcmul(x_df_ZHQ, dlog_ZHQ, A_H[:, None])
        dA_H, dD_H = (dlog_ZHQ * dt_ZHQ).sum((0, 2)), (dy * x).sum((0, 1, 3))
        dx = torch.addcmul(dy * D_H[:, None], df_ZHQP.transpose(1, 2), dt[..., None])
        return (
            dx,
            ddt_ZHQ.transpose(1, 2),
            dA_H,
            dB_ZGQN.transpose(1, 2),
            dC_ZGQN.transpose(1, 2),
            dD_H,
            dstate,
            None,
        )


def _is_later(Q: int, device: torch.device) -> Tensor:
    """True where token j (column) comes after token i (row)."""
    return torch.ones(Q, Q, dtype=torch.bool, device=device).triu(1)


def _decay_to_end(c_ZHQ: Tensor) -> Tensor:
    """[Z, H, Q, 1]: the decay from token j to the end of the chunk."""
    return (c_ZHQ[..., -1:] - c_ZHQ).exp()[..., None]


def _heads_first(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """[Z, Q, H, ...], times a factor, -> [Z, H, Q, ...], contiguous for batched products."""
    out = x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return out if factor is None else out.mul_(factor.transpose(1, 2))


def _weighted_scores(decay_ZHQQ: Tensor, scores_ZGQQ: Tensor) -> Tensor:
    """[Z, H, Q, Q]: the scores of each head's group, times the head's decay."""
    Z, H, Q, _ = decay_ZHQQ.shape
    G = scores_ZGQQ.shape[1]
    return (decay_ZHQQ.view(Z, G, H // G, Q, Q) * scores_ZGQQ[:, :, None]).view(Z, H, Q, Q)


def _grouped(x_ZHQP: Tensor, G: int) -> Tensor:
    """[Z, G, Q, M]: the heads of a group side by side."""
    Z, H, Q, P = x_ZHQP.shape
    return x_ZHQP.view(Z, G, H // G, Q, P).transpose(2, 3).reshape(Z, G, Q, -1)


def _ungrouped(x_ZGQM: Tensor, H: int) -> Tensor:
    """The inverse of `_grouped`: [Z, H, Q, P]."""
    Z, G, Q, _ = x_ZGQM.shape
    return x_ZGQM.view(Z, G, Q, H // G, -1).transpose(2, 3).reshape(Z, H, Q, -1)
