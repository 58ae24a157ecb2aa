"""Launches the kernels of the scan's gradient in order, and allocates the memory between them.

Only the inputs of the forward pass are saved. Decays, scores and the states at chunk borders are recomputed,
for a sixth of the gradient's own operations, where [tokens, heads, 128] would have to be saved for every
layer. For each chunk of 128 tokens the memory is two states and two score matrices per group in fp32: 10 and
1 MiB for 128 heads of 80.

Z chunks · S sequences · T tokens · H heads · P head dimension · G groups · N state size.
"""

import torch
from torch import Tensor

from nanohybrid.ops.launch import MIN_DOT, cdiv, contiguous_rows, dot_dtype, next_power_of_2
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan.backward import inputs as input_kernels
from nanohybrid.ops.ssd_scan.backward import scores, states
from nanohybrid.ops.ssd_scan.backward.chunks import chunk_table
from nanohybrid.ops.ssd_scan.inputs import SSDInputs
from nanohybrid.ops.ssd_scan.triton import ELEMENTS, intermediates, split_head_dim
from nanohybrid.ops.ssd_scan.triton.chunks import chunks

BLOCK = 64  # tokens of a tile: three of a chunk's four tiles of 64 x 64 are on or below the diagonal


def ssd_scan_backward(
    dy_THP: Tensor, dfinal_SHPN: Tensor | None, inputs: SSDInputs, layout: Layout
) -> SSDInputs:
    """The gradients of all inputs from those of y and (None where they are not used) of the final states.

    Gradients of x, B and C are in their dtypes, the others in fp32. That of `initial` is None where the scan
    began with zeros.
    """
    x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, initial_SHPN = inputs
    device = x_THP.device
    (T, H, P), (G, N) = x_THP.shape, B_TGN.shape[1:]
    x, B, C = (contiguous_rows(t) for t in (x_THP, B_TGN, C_TGN))
    dt, A, D, dy = dt_TH.contiguous(), A_H.contiguous(), D_H.contiguous(), dy_THP.contiguous()
    table = chunk_table(layout, device, initial_SHPN is not None, dfinal_SHPN is not None)
    Z = table.shape[1]
    split = split_head_dim(P)
    size = dict(P=P, N=N, OPERAND=dot_dtype(x_THP.dtype), BLOCK_N=next_power_of_2(N, MIN_DOT))
    tile = dict(CHUNK=CHUNK, BLOCK=BLOCK)
    busy = dict(num_warps=8, num_stages=2)  # with 4 warps the compiler for sm_90 spills registers

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # 1. the forward pass again: decays, the states that enter, scores
    c_TH, entering, scores_ZGQQ, _ = intermediates(SSDInputs(x, dt, A, B, C, D, initial_SHPN), layout, False)
    # 2. states, backward over the chunk borders
    leaving, dinitial = new(Z, H, P, N), None if initial_SHPN is None else new(layout.sequences, H, P, N)
    states.chunk_state_gradients[Z, G, cdiv(H // G * P, BLOCK)](
        dy, c_TH, C, leaving, table, C.stride(0), Z, H, G, BLOCK_R=BLOCK, BLOCK_Q=BLOCK, **size
    )
    dfinal = None if dfinal_SHPN is None else dfinal_SHPN.contiguous()
    states.state_passing_backward[layout.sequences, cdiv(H * P * N, ELEMENTS)](
        leaving, c_TH, table, chunks(layout, device)[2], dfinal, dinitial, Z, H, H * P * N, P, N,
        HAS_FINAL=dfinal is not None, HAS_INITIAL=dinitial is not None, BLOCK=ELEMENTS,
    )  # fmt: skip
    # 3. B and C
    dscores_ZGQQ, by_row, by_column = (
        new(Z, G, CHUNK, CHUNK),
        new(CHUNK // BLOCK, T, H),
        new(CHUNK // BLOCK, T, H),
    )
    scores.score_gradients[Z, G, (CHUNK // BLOCK) ** 2](
        x, dt, c_TH, dy, scores_ZGQQ, dscores_ZGQQ, by_row, by_column, table, x.stride(0), T, Z, H, G,
        P=P, OPERAND=size["OPERAND"], **tile, **split, **busy,
    )  # fmt: skip
    dB, dC = new(T, G, N, dtype=B.dtype), new(T, G, N, dtype=C.dtype)
    shared = dict(BLOCK_R=BLOCK, **tile, **size, **busy)
    scores.group_gradients[Z, G, CHUNK // BLOCK](
        dscores_ZGQQ,
        B,
        dy,
        dt,
        c_TH,
        entering,
        dC,
        table,
        table[2],
        B.stride(0),
        H * P,
        Z,
        H,
        G,
        OF_C=True,
        **shared,
    )
    scores.group_gradients[Z, G, CHUNK // BLOCK](
        dscores_ZGQQ,
        C,
        x,
        dt,
        c_TH,
        leaving,
        dB,
        table,
        table[3],
        C.stride(0),
        x.stride(0),
        Z,
        H,
        G,
        OF_C=False,
        **shared,
    )
    # 4. x, then dt and A
    dx = new(T, H, P, dtype=x_THP.dtype)
    x_df, r, e, S_dS = new(T, H), new(T, H), new(T, H), new(Z, H)
    dy_x = torch.zeros(Z, CHUNK // BLOCK, H, device=device)  # short chunks leave blocks unwritten
    input_kernels.input_gradients[Z, H, CHUNK // BLOCK](
        x, dt, c_TH, B, C, D, dy, scores_ZGQQ, entering, leaving, dx, x_df, r, e, dy_x, S_dS, table,
        x.stride(0), B.stride(0), C.stride(0), Z, H, G, **tile, **split, **size, **busy,
    )  # fmt: skip
    ddt, dA, heads = new(T, H), new(Z, H), next_power_of_2(min(H, 16))
    input_kernels.decay_gradients[Z, cdiv(H, heads)](
        dt,
        A,
        c_TH,
        by_row,
        by_column,
        x_df,
        r,
        e,
        S_dS,
        ddt,
        dA,
        table,
        T,
        Z,
        H,
        BLOCK_H=heads,
        **tile,
    )
    return SSDInputs(dx, ddt, dA.sum(0), dB, dC, dy_x.sum((0, 1)), dinitial)
