"""What each chunk adds to its sequence's state, and the state that each chunk starts from.

M = (H / G) P rows of a group: 1,280 for 16 heads of 80. They are cut into tiles of 64 that may span two
heads, so nothing is padded.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_state(
    x, dt, c, B, added, starts_Z, lengths_Z, x_stride, B_stride, M, P, N, H,
    TYPE: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """added [Z, H P, N] = sum_j exp(c_Q - c_j) dt_j x_j B_j^T, by products [ROWS, TOKENS] x [TOKENS, N]."""
    m, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, STATE)
    group, chunk = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, length = tl.load(starts_Z + chunk), tl.load(lengths_Z + chunk)
    is_row, is_n = m < M, n < N
    row = group * M + m  # among all (head, p)
    head = row // P
    end = tl.load(c + (start + length - 1) * H + head, mask=is_row, other=0)
    total = tl.zeros([ROWS, STATE], tl.float32)
    for first in range(0, length, TOKENS):
        t = first + tl.arange(0, TOKENS)
        token = start + t
        inside = is_row[:, None] & (t < length)[None, :]
        at = token[None, :] * H + head[:, None]
        decay = tl.exp(end[:, None] - tl.load(c + at, mask=inside, other=0)) * tl.load(
            dt + at, mask=inside, other=0
        )
        x_tile = (
            tl.load(x + token[None, :] * x_stride + row[:, None], mask=inside, other=0).to(tl.float32) * decay
        )
        B_tile = tl.load(
            B + token[:, None] * B_stride + group * N + n[None, :],
            mask=(t < length)[:, None] & is_n[None, :],
            other=0,
        )
        total = tl.dot(x_tile.to(TYPE), B_tile.to(TYPE), total, input_precision="ieee")
    tl.store(
        added + (chunk * H * P + row)[:, None] * N + n[None, :], total, mask=is_row[:, None] & is_n[None, :]
    )


@triton.jit
def state_passing(
    states, c, initial, final, starts_Z, lengths_Z, first_S1, H, size,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of a sequence, for ELEMENTS elements of the state.

    In `states`, what a chunk adds is replaced by the state that it starts from.
    """
    sequence = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside, head, whole = e < H * size, e // size, H * size  # size: elements of one head, P N
    state = tl.zeros([ELEMENTS], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + sequence * whole + e, mask=inside, other=0).to(tl.float32)
    for chunk in range(tl.load(first_S1 + sequence), tl.load(first_S1 + sequence + 1)):
        at = states + chunk * whole + e
        added = tl.load(at, mask=inside, other=0)
        tl.store(at, state, mask=inside)
        last = tl.load(starts_Z + chunk) + tl.load(lengths_Z + chunk) - 1
        state = tl.exp(tl.load(c + last * H + head, mask=inside, other=0)) * state + added
    if HAS_FINAL:
        tl.store(final + sequence * whole + e, state, mask=inside)
