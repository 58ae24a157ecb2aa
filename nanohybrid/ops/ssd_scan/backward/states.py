"""Kernels over the states at the borders of pieces: what each piece adds to one, and their passing from piece to piece.

    forwards    S_next  = exp(c_Q) S  + sum_j exp(c_Q - c_j) dt_j x_j B_j^T          recomputed: training keeps no states
    backwards   dS_last = exp(c_Q) dS + sum_i exp(c_i) dy_i C_i^T

A state is worked on as rows (head, channel) of N numbers: the 16 heads of 80 of a group are 1,280 rows, ten whole tiles, where
a tile a head would be 80 rows of 128. Only the row's decay depends on its head.

Z pieces · Q tokens of a piece · H heads · P head dimension · G groups · N state size · R rows (head, channel) of a group.
"""

import triton
import triton.language as tl


@triton.jit
def running_decay(dt, A, c, table, Z, H, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr):
    """c_TH: the sum of dt A from the start of the piece up to each token."""
    piece = tl.program_id(0)
    start, length = tl.load(table + piece), tl.load(table + Z + piece)
    j, h = tl.arange(0, CHUNK), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (j < length)[:, None] & (h < H)[None, :]
    at = (start + j)[:, None] * H + h[None, :]
    logs = tl.load(dt + at, mask=inside, other=0.0) * tl.load(A + h, mask=h < H, other=0.0)[None, :]
    tl.store(c + at, tl.cumsum(logs, 0), mask=inside)


@triton.jit
def piece_states(
    x, dt, c, B, out, table, flags, stride_x, stride_B, Z, H, G, P: tl.constexpr, N: tl.constexpr,
    FED: tl.constexpr, OPERAND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [Z, H P, N]: sum_j factor_j x_j B_j^T, where flags says it is wanted.

    FED: the factor is exp(c_Q - c_j) dt_j, for the state that leaves; otherwise exp(c_j), for the gradient of the one that enters.
    """
    piece, group = tl.program_id(0), tl.program_id(1)
    if tl.load(flags + piece) == 0:
        return
    start, length = tl.load(table + piece), tl.load(table + Z + piece)
    rows = H // G * P
    r, n = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    head = group * (H // G) + r // P
    c_last = tl.load(c + (start + length - 1) * H + head, mask=r < rows, other=0.0)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_Q):
        j = first + tl.arange(0, BLOCK_Q)
        token = start + j
        inside = (r < rows)[:, None] & (j < length)[None, :]
        decay = tl.load(c + token[None, :] * H + head[:, None], mask=inside, other=0.0)
        if FED:
            factor = tl.exp(c_last[:, None] - decay) * tl.load(dt + token[None, :] * H + head[:, None], mask=inside, other=0.0)
        else:
            factor = tl.exp(decay)
        x_RQ = tl.load(x + token[None, :] * stride_x + (group * rows + r)[:, None], mask=inside, other=0.0).to(tl.float32)
        B_QN = tl.load(B + token[:, None] * stride_B + group * N + n[None, :], mask=(j < length)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot((x_RQ * factor).to(OPERAND), B_QN.to(OPERAND), total, input_precision="ieee")
    at = (piece.to(tl.int64) * G + group) * rows * N + r[:, None] * N + n[None, :]
    tl.store(out + at, total, mask=(r < rows)[:, None] & (n < N)[None, :])


@triton.jit
def pass_states(
    states, c, table, flags, bounds, first, last, Z, H, SIZE, P: tl.constexpr, N: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what each piece adds into what enters it, in place: states [Z, H P N], from `first` [S, H P N] or zeros, to `last`.

    REVERSE: from the last piece of each sequence to its first.
    """
    sequence, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, head = at < SIZE, at // (P * N)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    carried = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        carried = tl.load(first + sequence * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    for step in range(0, end - begin):
        piece = begin + step
        if REVERSE:
            piece = end - 1 - step
        start, length = tl.load(table + piece), tl.load(table + Z + piece)
        decay = tl.exp(tl.load(c + (start + length - 1) * H + head, mask=inside, other=0.0))
        there = tl.load(flags + piece) != 0
        added = tl.load(states + piece * SIZE + at, mask=inside & there, other=0.0)
        tl.store(states + piece * SIZE + at, carried, mask=inside)
        carried = decay * carried + added
    if HAS_LAST:
        tl.store(last + sequence * SIZE + at, carried, mask=inside)
