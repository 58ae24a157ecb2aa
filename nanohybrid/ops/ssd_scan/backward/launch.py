"""The order of the kernels that make the scan's gradient, and the memory between them.

Nothing of forward is kept but its inputs: the decays, scores and states at the borders are made again, for a sixth of the
gradient's own operations, instead of [tokens, heads, 128] kept for every layer. For each piece of 128 tokens the memory is two
states and two score matrices a group in fp32: 10 and 1 MiB for 128 heads of 80.

Z pieces · S sequences · T tokens · H heads · P head dimension · G groups · N state size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanohybrid.ops.launch import LEAST_DOT, blocks, operand, power, rows_in_place
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan.backward import inputs, pieces, scores, states
from nanohybrid.ops.ssd_scan.triton import ELEMENTS, between, columns
from nanohybrid.ops.ssd_scan.triton.pieces import pieces as triton_pieces

BLOCK = 64  # tokens of a tile: three of a piece's four tiles of 64 x 64 are on or below the diagonal


class Gradients(NamedTuple):
    """In the dtypes of what they belong to; initial_SHPN is None where the scan began with zeros."""

    x_THP: Tensor
    dt_TH: Tensor
    A_H: Tensor
    B_TGN: Tensor
    C_TGN: Tensor
    D_H: Tensor
    initial_SHPN: Tensor | None


def ssd_scan_backward(
    dy_THP: Tensor,
    dfinal_SHPN: Tensor | None,
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    D_H: Tensor,
    layout: Layout,
    initial_SHPN: Tensor | None = None,
) -> Gradients:
    """Gradients of all the scan's inputs from those of y and (None where nobody used them) of the final states."""
    device = x_THP.device
    (T, H, P), (G, N) = x_THP.shape, B_TGN.shape[1:]
    x, B, C = (rows_in_place(t) for t in (x_THP, B_TGN, C_TGN))
    dt, A, D, dy = dt_TH.contiguous(), A_H.contiguous(), D_H.contiguous(), dy_THP.contiguous()
    table = pieces.table(layout, device, initial_SHPN is not None, dfinal_SHPN is not None)
    Z = table.shape[1]
    split = columns(P)
    size = dict(P=P, N=N, OPERAND=operand(x_THP.dtype), BLOCK_N=power(N, LEAST_DOT))
    tile = dict(CHUNK=CHUNK, BLOCK=BLOCK)
    busy = dict(
        num_warps=8, num_stages=2
    )  # with 4 warps the compiler for sm_90 runs out of registers and spills

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # 1. forwards again: decays, the states that enter, scores
    c_TH, entering, scores_ZGQQ, _ = between(x, dt, A, B, C, layout, initial_SHPN, False)
    # 2. backwards over the borders
    leaving, dinitial = new(Z, H, P, N), None if initial_SHPN is None else new(layout.sequences, H, P, N)
    states.read_states[Z, G, blocks(H // G * P, BLOCK)](
        dy, c_TH, C, leaving, table, C.stride(0), Z, H, G, BLOCK_R=BLOCK, BLOCK_Q=BLOCK, **size
    )
    dfinal = None if dfinal_SHPN is None else dfinal_SHPN.contiguous()
    states.pass_back[layout.sequences, blocks(H * P * N, ELEMENTS)](
        leaving, c_TH, table, triton_pieces(layout, device)[2], dfinal, dinitial, Z, H, H * P * N, P, N,
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
    fed_by, read_by, left_by, carried = new(T, H), new(T, H), new(T, H), new(Z, H)
    skipped = torch.zeros(Z, CHUNK // BLOCK, H, device=device)  # short pieces leave blocks unwritten
    inputs.input_gradients[Z, H, CHUNK // BLOCK](
        x, dt, c_TH, B, C, D, dy, scores_ZGQQ, entering, leaving, dx, fed_by, read_by, left_by, skipped, carried, table,
        x.stride(0), B.stride(0), C.stride(0), Z, H, G, **tile, **split, **size, **busy,
    )  # fmt: skip
    ddt, dA, heads = new(T, H), new(Z, H), power(min(H, 16))
    inputs.decay_gradients[Z, blocks(H, heads)](
        dt,
        A,
        c_TH,
        by_row,
        by_column,
        fed_by,
        read_by,
        left_by,
        carried,
        ddt,
        dA,
        table,
        T,
        Z,
        H,
        BLOCK_H=heads,
        **tile,
    )
    return Gradients(dx, ddt, dA.sum(0), dB, dC, skipped.sum((0, 1)), dinitial)
