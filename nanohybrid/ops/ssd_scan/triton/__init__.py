"""The SSD scan on a GPU: five kernels over all chunks of all sequences at once (Dao & Gu 2024, section 6).

A chunk is the part of one sequence in this batch between two multiples of 128 of its absolute position. Where
a prompt is cut at such multiples, the sums are the same however often it is cut.

    1. c_i = sum_{j <= i} dt_j A               of each chunk                                     decay.py
    2. S_local = sum_j exp(c_Q - c_j) dt_j x_j B_j^T        heads of a group as one matrix       states.py
    3. S' = exp(c_Q) S + S_local               along each sequence, in fp32                      states.py
    4. scores_ij = C_i . B_j                   once for the heads of a group                     outputs.py
    5. y_i = sum_{j <= i} exp(c_i - c_j) scores_ij dt_j x_j + exp(c_i) S C_i + D x_i             outputs.py

T tokens · S sequences · Z chunks · Q = 128 · H heads · P head dimension · G groups · N state size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanohybrid.ops.launch import MIN_DOT, cdiv, contiguous_rows, dot_dtype, next_power_of_2
from nanohybrid.ops.layout import Layout
from nanohybrid.ops.sizes import CHUNK
from nanohybrid.ops.ssd_scan.inputs import SSDInputs
from nanohybrid.ops.ssd_scan.triton import decay, outputs, states
from nanohybrid.ops.ssd_scan.triton.chunks import chunks

TOKENS, ROWS, ELEMENTS = 64, 64, 1024  # of a tile: of a chunk, of a group's (head, p) rows, of a state
STAGES = 2  # of loads ahead in `chunk_state`: three need 128 KiB of shared memory, and an A10G or L4 has 99


def ssd_scan(
    inputs: SSDInputs, layout: Layout, output_final_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """y_THP and the final states in fp32 (None unless `output_final_state`).

    Products have operands in x's dtype, sums are fp32.
    """
    x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H, _ = inputs
    (T, H, P), (G, N) = x_THP.shape, B_TGN.shape[1:]
    x_THP, C_TGN = contiguous_rows(x_THP), contiguous_rows(C_TGN)
    dt_TH, A_H, D_H = (m.float().contiguous() for m in (dt_TH, A_H, D_H))
    starts_Z, lengths_Z, _ = chunks(layout, x_THP.device)
    c_TH, states_ZHPN, scores_ZGQQ, final_SHPN = intermediates(
        inputs._replace(x_THP=x_THP, dt_TH=dt_TH, A_H=A_H, C_TGN=C_TGN), layout, output_final_state
    )
    y_THP = dt_TH.new_empty(T, H, P)
    outputs.chunk_scan[(cdiv(CHUNK, TOKENS), H, len(starts_Z))](
        x_THP, dt_TH, c_TH, C_TGN, D_H, states_ZHPN, scores_ZGQQ, y_THP, starts_Z, lengths_Z, x_THP.stride(0),
        C_TGN.stride(0), H, P, N, G, TYPE=dot_dtype(x_THP.dtype), Q=CHUNK, TOKENS=TOKENS,
        STATE=next_power_of_2(N, MIN_DOT), **split_head_dim(P),
    )  # fmt: skip
    return y_THP, final_SHPN


class Intermediates(NamedTuple):
    """The results of steps 1 to 4: log-decays, each chunk's initial state, scores, final states or None."""

    c_TH: Tensor
    states_ZHPN: Tensor
    scores_ZGQQ: Tensor
    final_SHPN: Tensor | None


def intermediates(inputs: SSDInputs, layout: Layout, output_final_state: bool) -> Intermediates:
    """Steps 1 to 4, which the backward pass computes again. dt and A in fp32."""
    x_THP, dt_TH, A_H, B_TGN, C_TGN, _, initial_SHPN = inputs
    (_, H, P), (G, N), S = x_THP.shape, B_TGN.shape[1:], layout.sequences
    x_THP, B_TGN, C_TGN = (contiguous_rows(m) for m in (x_THP, B_TGN, C_TGN))
    dt_TH, A_H = dt_TH.contiguous(), A_H.contiguous()
    device, dtype = x_THP.device, dot_dtype(x_THP.dtype)
    starts_Z, lengths_Z, first_S1 = chunks(layout, device)
    Z, group_rows = len(starts_Z), H // G * P
    # 1. decay
    c_TH = torch.empty_like(dt_TH)
    heads = next_power_of_2(min(H, 16))
    decay.chunk_cumsum[(Z, cdiv(H, heads))](dt_TH, A_H, c_TH, starts_Z, lengths_Z, H, Q=CHUNK, HEADS=heads)
    # 2. and 3. states: first what each chunk adds, then in its place the state that the chunk starts from
    states_ZHPN = dt_TH.new_empty(Z, H, P, N)
    width = next_power_of_2(N, MIN_DOT)
    states.chunk_state[(cdiv(group_rows, ROWS), G, Z)](
        x_THP, dt_TH, c_TH, B_TGN, states_ZHPN, starts_Z, lengths_Z, x_THP.stride(0), B_TGN.stride(0),
        group_rows, P, N, H, TYPE=dtype, ROWS=ROWS, STATE=width, TOKENS=TOKENS, num_stages=STAGES,
    )  # fmt: skip
    initial = None if initial_SHPN is None else initial_SHPN.contiguous()
    final_SHPN = dt_TH.new_empty(S, H, P, N) if output_final_state else None
    states.state_passing[(S, cdiv(H * P * N, ELEMENTS))](
        states_ZHPN, c_TH, initial, final_SHPN, starts_Z, lengths_Z, first_S1, H, P * N,
        HAS_INITIAL=initial is not None, HAS_FINAL=output_final_state, ELEMENTS=ELEMENTS,
    )  # fmt: skip
    # 4. scores
    scores_ZGQQ = dt_TH.new_empty(Z, G, CHUNK, CHUNK)
    tiles = cdiv(CHUNK, TOKENS)
    outputs.bmm_chunk[(tiles * tiles, G, Z)](
        B_TGN, C_TGN, scores_ZGQQ, starts_Z, lengths_Z, B_TGN.stride(0), C_TGN.stride(0), N, G,
        TYPE=dtype, Q=CHUNK, TOKENS=TOKENS, STATE=width,
    )  # fmt: skip
    return Intermediates(c_TH, states_ZHPN, scores_ZGQQ, final_SHPN)


def split_head_dim(P: int) -> dict[str, int]:
    """The head dimension as its largest power of two and the rest: 80 is 64 and 16, not a padded 128."""
    first = max(MIN_DOT, 1 << (P.bit_length() - 1))
    return {"FIRST": first, "SECOND": 0 if first >= P else next_power_of_2(P - first, MIN_DOT)}
