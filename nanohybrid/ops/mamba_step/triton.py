"""The SSD recurrence for one token of each sequence, in place: each state is read and written once.

    dt = softplus(dt + dt_bias), clamped to [low, high];   A = -exp(A_log)
    S = exp(dt A) S + dt x B^T                              y = S C + D x

A program computes 16 of a head's P rows of a state. That is 640 programs for one sequence of 128 heads of 80,
enough to fill a GPU at batch 1, and no padding where 16 divides P. The gate belongs to the norm
(ops/gated_norm), which reads z anyway.

S sequences · H heads · P head dimension · G groups · N state size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanohybrid.ops.causal_conv.triton import conv_silu_step
from nanohybrid.ops.launch import cdiv, next_power_of_2
from nanohybrid.ops.layout import Layout

ROWS = 16  # of a state, per program


def mamba_step(
    xBC_SC: Tensor, dt_SH: Tensor, conv_weight_CW: Tensor, conv_bias_C: Tensor, dt_bias_H: Tensor, A_log_H:
    Tensor, D_H: Tensor, conv_pool: Tensor, ssm_pool: Tensor, layout: Layout, groups: int, limit: tuple[float,
    float],
) -> Tensor:  # fmt: skip
    """The step of the convolution, then that of the recurrence."""
    slots_S, positions_S = layout.slot_index(ssm_pool.device), layout.token_positions(ssm_pool.device)
    xBC_SC = conv_silu_step(xBC_SC, conv_weight_CW, conv_bias_C, conv_pool, slots_S, positions_S)
    return ssd_update(xBC_SC, dt_SH, dt_bias_H, A_log_H, D_H, ssm_pool, slots_S, positions_S, groups, *limit)


def ssd_update(
    xBC_SC: Tensor, dt_SH: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, pool: Tensor,
    slots_S: Tensor, positions_S: Tensor, groups: int, low: float, high: float,
) -> Tensor:  # fmt: skip
    """y [S, H, P] in fp32.

    The rows `slots_S` of pool [slots, H, P, N] are updated in place: computed in fp32, stored in its dtype.

    xBC: x [H P], B [G N] and C [G N] side by side, after the convolution. dt: as in_proj gives it. At
    position 0 a state is zeros.
    """
    S, (_, H, P, N) = len(xBC_SC), pool.shape
    y_SHP = torch.empty(S, H, P, dtype=torch.float32, device=pool.device)
    _update[(cdiv(P, ROWS), H, S)](
        xBC_SC, dt_SH, dt_bias_H, A_log_H, D_H, pool, y_SHP, slots_S, positions_S, xBC_SC.stride(0),
        dt_SH.stride(0), H // groups, H, P, N, groups, low, high, ROWS=ROWS, STATE=next_power_of_2(N),
        num_warps=4,
    )  # fmt: skip
    return y_SHP


@triton.jit
def _update(
    xBC, dt_SH, dt_bias, A_log, D, pool, y, slots_S, positions_S, stride, dt_stride, heads_per_group, H, P, N,
    G, low, high, ROWS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    p, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, STATE)
    h, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_p, is_n = p < P, n < N
    # 1. dt and the decay of this head
    dt = tl.load(dt_SH + sequence * dt_stride + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    exp_dt = tl.exp(tl.minimum(dt, 20.0))
    softplus = tl.log(1 + exp_dt) * tl.where(
        1 + exp_dt == 1, 1, exp_dt / (1 + exp_dt - 1)
    )  # log1p without cancellation
    dt = tl.where(dt > 20, dt, tl.where(1 + exp_dt == 1, exp_dt, softplus))
    dt = tl.minimum(tl.maximum(dt, low), high)
    decay = tl.exp(-dt * tl.exp(tl.load(A_log + h).to(tl.float32)))
    # 2. x of these rows, B and C of the head's group
    row = xBC + sequence * stride
    group = row + H * P + (h // heads_per_group) * N + n
    x = tl.load(row + h * P + p, mask=is_p, other=0).to(tl.float32)
    B = tl.load(group, mask=is_n, other=0).to(tl.float32)
    C = tl.load(group + G * N, mask=is_n, other=0).to(tl.float32)
    # 3. the state, loaded once and stored once
    inside = is_p[:, None] & is_n[None, :]
    at = pool + ((tl.load(slots_S + sequence) * H + h) * P + p)[:, None] * N + n[None, :]
    fresh = tl.load(positions_S + sequence) == 0
    state = tl.load(at, mask=inside & (not fresh), other=0).to(tl.float32)
    state = state * decay + (x * dt)[:, None] * B[None, :]
    tl.store(at, state.to(pool.dtype.element_ty), mask=inside)
    # 4. the output
    y_P = tl.sum(state * C[None, :], 1) + tl.load(D + h).to(tl.float32) * x
    tl.store(y + (sequence * H + h) * P + p, y_P, mask=is_p)
