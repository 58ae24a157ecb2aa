"""Kernels for the gradients of the states at the borders of pieces: what each piece adds to one, and their passing backwards.

    dS_given = exp(c_Q) dS_left + sum_i exp(c_i) dy_i C_i^T

A state is worked on as rows (head, channel) of N numbers: the 16 heads of 80 of a group are 1,280 rows, twenty whole tiles, where
a tile a head would be 80 rows of 128. Only the row's decay depends on its head.

Z pieces · Q tokens of a piece · H heads · P head dimension · G groups · N state size · R rows (head, channel) of a group.
"""

import triton
import triton.language as tl


@triton.jit
def read_states(
    dy, c, C, out, table, stride_C, Z, H, G, P: tl.constexpr, N: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [Z, H P, N]: sum_i exp(c_i) dy_i C_i^T, of the pieces that a state enters."""
    piece, group = tl.program_id(0), tl.program_id(1)
    if tl.load(table + 2 * Z + piece) == 0:
        return
    start, length = tl.load(table + piece), tl.load(table + Z + piece)
    rows = H // G * P
    r, n = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    head = group * (H // G) + r // P
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_Q):
        i = first + tl.arange(0, BLOCK_Q)
        token = start + i
        inside = (r < rows)[:, None] & (i < length)[None, :]
        factor = tl.exp(tl.load(c + token[None, :] * H + head[:, None], mask=inside, other=0.0))
        dy_RQ = tl.load(dy + token[None, :] * H * P + (group * rows + r)[:, None], mask=inside, other=0.0).to(
            tl.float32
        )
        C_QN = tl.load(
            C + token[:, None] * stride_C + group * N + n[None, :],
            mask=(i < length)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        total = tl.dot((dy_RQ * factor).to(OPERAND), C_QN.to(OPERAND), total, input_precision="ieee")
    at = (piece.to(tl.int64) * G + group) * rows * N + r[:, None] * N + n[None, :]
    tl.store(out + at, total, mask=(r < rows)[:, None] & (n < N)[None, :])


@triton.jit
def pass_back(
    states, c, table, bounds, final, initial, Z, H, SIZE, P: tl.constexpr, N: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In states [Z, H P, N], what each piece adds becomes the gradient of what leaves it, from each sequence's last piece to its
    first; from `final` [S, H P, N] or zeros, on to `initial`."""
    sequence, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, head = at < SIZE, at // (P * N)
    begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    carried = tl.zeros((BLOCK,), tl.float32)
    if HAS_FINAL:
        carried += tl.load(final + sequence * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    for step in range(end - begin):
        piece = end - 1 - step
        start, length = tl.load(table + piece), tl.load(table + Z + piece)
        decay = tl.exp(tl.load(c + (start + length - 1) * H + head, mask=inside, other=0.0))
        there = tl.load(table + 2 * Z + piece) != 0
        added = tl.load(states + piece * SIZE + at, mask=inside & there, other=0.0)
        tl.store(states + piece * SIZE + at, carried, mask=inside)
        carried = decay * carried + added
    if HAS_INITIAL:
        tl.store(initial + sequence * SIZE + at, carried, mask=inside)
