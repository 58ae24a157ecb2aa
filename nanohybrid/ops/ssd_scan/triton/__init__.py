"""The SSD scan on a GPU: five kernels over all pieces of all sequences at once (Dao & Gu 2024, section 6).

A piece is what a batch holds of one sequence between two multiples of 128 of its absolute position; pieces of one sequence
follow one another, and no piece holds two. Where a prompt is cut at such multiples, the sums are the same however often.

    1. c_i = sum_{j <= i} dt_j A               of each piece                                           decay.py
    2. S_local = sum_j exp(c_Q - c_j) dt_j x_j B_j^T        heads of a group as one matrix             states.py
    3. S' = exp(c_Q) S + S_local               along each sequence, in fp32                            states.py
    4. scores_ij = C_i . B_j                   once for the heads of a group                           outputs.py
    5. y_i = sum_{j <= i} exp(c_i - c_j) scores_ij dt_j x_j + exp(c_i) S C_i + D x_i                   outputs.py

T tokens · S sequences · Z pieces · Q = 128 · H heads · P head dimension · G groups · N state size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanohybrid.ops.launch import LEAST_DOT, blocks, operand, power, rows_in_place
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan.triton import decay, outputs, states
from nanohybrid.ops.ssd_scan.triton.pieces import pieces

TOKENS, ROWS, ELEMENTS = 64, 64, 1024  # of a tile of a piece, of a group's (head, p) rows, of a state
STAGES = 2  # of loads ahead in `local`: three want 128 KiB of shared memory, and an A10G or L4 has 99


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
    """y_THP in fp32, and the final states in fp32 (None unless `keep`). Products take operands in x's dtype, sums fp32."""
    (T, H, P), (G, N) = x_THP.shape, B_TGN.shape[1:]
    x_THP, C_TGN = rows_in_place(x_THP), rows_in_place(C_TGN)
    dt_TH, A_H, D_H = (m.float().contiguous() for m in (dt_TH, A_H, D_H))
    starts_Z, lengths_Z, _ = pieces(layout, x_THP.device)
    c_TH, given_ZHPN, scores_ZGQQ, final_SHPN = between(
        x_THP, dt_TH, A_H, B_TGN, C_TGN, layout, initial_SHPN, keep
    )
    y_THP = dt_TH.new_empty(T, H, P)
    outputs.outputs[(blocks(CHUNK, TOKENS), H, len(starts_Z))](
        x_THP, dt_TH, c_TH, C_TGN, D_H, given_ZHPN, scores_ZGQQ, y_THP, starts_Z, lengths_Z,
        x_THP.stride(0), C_TGN.stride(0), H, P, N, G,
        TYPE=operand(x_THP.dtype), Q=CHUNK, TOKENS=TOKENS, STATE=power(N, LEAST_DOT), **columns(P),
    )  # fmt: skip
    return y_THP, final_SHPN


class Between(NamedTuple):
    """What steps 1 to 4 leave in memory: decays, the state each piece is given, scores, final states (None unless kept)."""

    c_TH: Tensor
    given_ZHPN: Tensor
    scores_ZGQQ: Tensor
    final_SHPN: Tensor | None


def between(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    layout: Layout,
    initial_SHPN: Tensor | None,
    keep: bool,
) -> Between:
    """Steps 1 to 4: what outputs are made of, and made again for the gradient. dt and A in fp32."""
    (_, H, P), (G, N), S = x_THP.shape, B_TGN.shape[1:], layout.sequences
    x_THP, B_TGN, C_TGN = (rows_in_place(m) for m in (x_THP, B_TGN, C_TGN))
    dt_TH, A_H = dt_TH.contiguous(), A_H.contiguous()
    device, type_ = x_THP.device, operand(x_THP.dtype)
    starts_Z, lengths_Z, first_S1 = pieces(layout, device)
    Z, group_rows = len(starts_Z), H // G * P
    # 1. decay
    c_TH = torch.empty_like(dt_TH)
    heads = power(min(H, 16))
    decay.running[(Z, blocks(H, heads))](dt_TH, A_H, c_TH, starts_Z, lengths_Z, H, Q=CHUNK, HEADS=heads)
    # 2. and 3. states: first what each piece adds, then in the same place what each piece is given
    given_ZHPN = dt_TH.new_empty(Z, H, P, N)
    width = power(N, LEAST_DOT)
    states.local[(blocks(group_rows, ROWS), G, Z)](
        x_THP, dt_TH, c_TH, B_TGN, given_ZHPN, starts_Z, lengths_Z, x_THP.stride(0), B_TGN.stride(0), group_rows, P, N, H,
        TYPE=type_, ROWS=ROWS, STATE=width, TOKENS=TOKENS, num_stages=STAGES,
    )  # fmt: skip
    initial = None if initial_SHPN is None else initial_SHPN.contiguous()
    final_SHPN = dt_TH.new_empty(S, H, P, N) if keep else None
    states.carried[(S, blocks(H * P * N, ELEMENTS))](
        given_ZHPN, c_TH, initial, final_SHPN, starts_Z, lengths_Z, first_S1, H, P * N,
        INITIAL=initial is not None, KEEP=keep, ELEMENTS=ELEMENTS,
    )  # fmt: skip
    # 4. scores
    scores_ZGQQ = dt_TH.new_empty(Z, G, CHUNK, CHUNK)
    tiles = blocks(CHUNK, TOKENS)
    outputs.scores[(tiles * tiles, G, Z)](
        B_TGN, C_TGN, scores_ZGQQ, starts_Z, lengths_Z, B_TGN.stride(0), C_TGN.stride(0), N, G,
        TYPE=type_, Q=CHUNK, TOKENS=TOKENS, STATE=width,
    )  # fmt: skip
    return Between(c_TH, given_ZHPN, scores_ZGQQ, final_SHPN)


def columns(P: int) -> dict[str, int]:
    """Head dimension as the largest power of two in it and what is left: 80 is 64 and 16, not a padded 128."""
    first = max(LEAST_DOT, 1 << (P.bit_length() - 1))
    return {"FIRST": first, "SECOND": 0 if first >= P else power(P - first, LEAST_DOT)}
