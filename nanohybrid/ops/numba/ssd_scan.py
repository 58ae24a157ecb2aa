"""The SSD scan and its gradient for training on a CPU, token by token, with states in the L1 cache.

That costs about as many products as the chunked form, without its passes over [tokens, heads, chunk]
matrices. Only the inputs are saved for the backward pass. With f = dt x, and E the gradient of a state:

    S_t = exp(dt_t A) S_{t-1} + f_t B_t^T        y_t = S_t C_t + D x_t            (Dao & Gu 2024, section 2)
    E_t = exp(dt_{t+1} A) E_{t+1} + dy_t C_t^T   df_t = E_t B_t   dB_t = E_t^T f_t   dC_t = S_t^T dy_t

The decay's gradient is a running sum from the end, g_t = g_{t+1} + dC_t . C_t - dB_t . B_t of this head's
share alone. The sum is a difference of large numbers, so every ANCHOR tokens it is reset to its exact value,
exp(dt_{t+1} A) E_{t+1} . S_t.

Threads partition the pairs (sequence, group of heads). dB and dC are sums over a group's heads, so no two
threads add to the same element, and the order of the sums does not depend on the number of threads.

H heads · P head dimension · G groups · N state size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nanohybrid.ops.numba.jit import inline, kernel
from nanohybrid.ops.numba.memory import BF16_BYTES, F32_BYTES, as_f32, as_i64, f32_at, keep_alive
from nanohybrid.ops.numba.rows import add_into, copy, dot, fill_zeros, load_row, store_row
from nanohybrid.ops.numba.ssd_scan_rows import ROWS, backward_step, forward_step
from nanohybrid.ops.numba.ssd_step_rows import update_state_rows
from nanohybrid.ops.numba.threads import rank_of

TOKENS = 16  # of one head, processed as a block
BAND = 16  # rows of a state that process a block together: with the block's B and C they fit in 32 KiB
ANCHOR = 64  # tokens between two states that the backward pass stores, a multiple of TOKENS


class Sizes(NamedTuple):
    """Sizes of a scan, and the row strides of x, B and C in elements."""

    H: int
    P: int
    G: int
    N: int
    x_stride: int
    B_stride: int
    C_stride: int


class ForwardTensors(NamedTuple):
    """Addresses; 0 for a tensor that is absent. x, B and C are bfloat16 or fp32, all others fp32."""

    x: int
    dt: int
    A: int
    B: int
    C: int
    D: int
    initial: int  # [sequences, H, P, N], or 0 for zeros
    final: int  # [sequences, H, P, N], or 0 if not wanted
    y: int  # [T, H, P]


class BackwardTensors(NamedTuple):
    """Addresses; 0 for an absent tensor. dx, dB and dC have the dtype of x, B and C, other gradients fp32."""

    x: int
    dt: int
    A: int
    B: int
    C: int
    D: int
    initial: int
    dy: int  # [T, H, P]
    dfinal: int  # [sequences, H, P, N], or 0 for zeros
    dx: int
    ddt: int
    dB: int
    dC: int
    dinitial: int  # or 0 if not wanted
    dA: int  # [sequences, H]
    dD: int  # [sequences, H]


SIZES = Sizes(*range(len(Sizes._fields)))
FORWARD = ForwardTensors(*range(len(ForwardTensors._fields)))
BACKWARD = BackwardTensors(*range(len(BackwardTensors._fields)))


class Block(NamedTuple):
    """Scratch for TOKENS tokens of one head in padded fp32: per token `rows` of x, `columns` of B and C."""

    rows: int
    columns: int
    x: int
    B: int
    C: int
    dt: int
    decay: int


class Gradients(NamedTuple):
    """Scratch of the backward pass, fp32, for the tokens of a block.

    f: dt x. sums: a gradient of B or C, [TOKENS, columns].
    """

    f: int
    dy: int
    df: int
    sums: int


class Sequence(NamedTuple):
    """Scratch of the backward pass per sequence: dC . C of each token, dB, dC, a state every ANCHOR
    tokens.
    """

    C_dC: int
    dB: int
    dC: int
    anchors: int
    begin: int
    length: int


@inline
def round_up(count, multiple):
    """The smallest multiple that is at least `count`."""
    return (count + multiple - 1) // multiple * multiple


@inline
def load_state(source, rows, columns, out, padded_rows, padded):
    """A state [rows, columns], padded with zeros to [padded_rows, padded]; all zeros where `source` is 0."""
    if source == 0:
        fill_zeros(out, padded_rows * padded)
        return
    for row in range(rows):
        load_row(f32_at(source, row * columns), False, columns, f32_at(out, row * padded), padded)
    fill_zeros(f32_at(out, rows * padded), (padded_rows - rows) * padded)


@inline
def load_block(block, first, count, head, group, sizes, tensors, is_bf16):
    """Load x, B, C and dt of `count` tokens from `first` on, and compute their decays.

    tensors: ForwardTensors or BackwardTensors; their first words are the same.
    """
    H, P, N = sizes[SIZES.H], sizes[SIZES.P], sizes[SIZES.N]
    width = BF16_BYTES if is_bf16 else F32_BYTES
    dt, A = as_f32(tensors[FORWARD.dt]), as_f32(tensors[FORWARD.A])[head]
    step, decay = as_f32(block.dt), as_f32(block.decay)
    for i in range(count):
        t = first + i
        x = tensors[FORWARD.x] + (t * sizes[SIZES.x_stride] + head * P) * width
        B = tensors[FORWARD.B] + (t * sizes[SIZES.B_stride] + group * N) * width
        C = tensors[FORWARD.C] + (t * sizes[SIZES.C_stride] + group * N) * width
        load_row(x, is_bf16, P, f32_at(block.x, i * block.rows), block.rows)
        load_row(B, is_bf16, N, f32_at(block.B, i * block.columns), block.columns)
        load_row(C, is_bf16, N, f32_at(block.C, i * block.columns), block.columns)
        step[i] = dt[t * H + head]
        decay[i] = np.float32(math.exp(step[i] * A))


@inline
def load_dy(block, gradients, first, count, head, H, P, source):
    """Load dy of `count` tokens as padded rows, and compute f = dt x of them."""
    rows = block.rows
    for i in range(count):
        dy = f32_at(source, ((first + i) * H + head) * P)
        load_row(dy, False, P, f32_at(gradients.dy, i * rows), rows)
        step, x, f = (
            as_f32(block.dt)[i],
            as_f32(f32_at(block.x, i * rows)),
            as_f32(f32_at(gradients.f, i * rows)),
        )
        for p in range(rows):
            f[p] = step * x[p]


@inline
def unpack_args(call):
    """The first arguments of both kernels: sequences, starts [sequences + 1], Sizes, tensors, is_bf16."""
    w = as_i64(call)
    return w[0], as_i64(w[1]), as_i64(w[2]), as_i64(w[3]), w[4]


@kernel
def scan_forward(rank, size, control, call):
    """y and, where wanted, the final states. The tensors are ForwardTensors."""
    sequences, starts, sizes, tensors, is_bf16 = unpack_args(call)
    H, P, G, N = sizes[SIZES.H], sizes[SIZES.P], sizes[SIZES.G], sizes[SIZES.N]
    rows, columns = round_up(P, ROWS), round_up(N, 16)
    scratch = np.empty(rows * columns + TOKENS * (2 * rows + 2 * columns + 2), dtype=np.float32)
    state = scratch.ctypes.data
    x = f32_at(state, rows * columns)
    y, B = f32_at(x, TOKENS * rows), f32_at(x, 2 * TOKENS * rows)
    C = f32_at(B, TOKENS * columns)
    dt = f32_at(C, TOKENS * columns)
    block = Block(rows, columns, x, B, C, dt, f32_at(dt, TOKENS))
    total = starts[sequences] * G
    for sequence in range(sequences):
        begin, length = starts[sequence], starts[sequence + 1] - starts[sequence]
        for group in range(G):
            if rank_of(begin * G + group * length, total, size) != rank:
                continue
            for head in range(group * (H // G), (group + 1) * (H // G)):
                state_index = (sequence * H + head) * P * N
                initial, final = tensors[FORWARD.initial], tensors[FORWARD.final]
                load_state(f32_at(initial, state_index) if initial else 0, P, N, state, rows, columns)
                done = 0
                while done < length:
                    count = min(TOKENS, length - done)
                    load_block(block, begin + done, count, head, group, sizes, tensors, is_bf16)
                    _run_block(block, state, y, count)
                    _store_y(block, y, begin + done, count, head, H, P, tensors)
                    done += count
                if final:
                    for row in range(P):
                        target = f32_at(final, state_index + row * N)
                        store_row(f32_at(state, row * columns), False, N, target)
    keep_alive(scratch)


@inline
def _run_block(block, state, y, count):
    """Move the state through the block's tokens, a band of rows at a time; y = S C of each token."""
    band = 0
    while band < block.rows:
        rows = min(BAND, block.rows - band)
        for i in range(count):
            at = i * block.rows + band
            B, C = f32_at(block.B, i * block.columns), f32_at(block.C, i * block.columns)
            decay, dt = as_f32(block.decay)[i], as_f32(block.dt)[i]
            part = f32_at(state, band * block.columns)
            update_state_rows(part, f32_at(block.x, at), B, C, f32_at(y, at), decay, dt, rows, block.columns)
        band += BAND


@inline
def _store_y(block, y, first, count, head, H, P, tensors):
    """y + D x of the block's tokens."""
    out, D = as_f32(tensors[FORWARD.y]), as_f32(tensors[FORWARD.D])[head]
    for i in range(count):
        x, SC = as_f32(f32_at(block.x, i * block.rows)), as_f32(f32_at(y, i * block.rows))
        at = ((first + i) * H + head) * P
        for p in range(P):
            out[at + p] = SC[p] + D * x[p]


@kernel
def scan_backward(rank, size, control, call):
    """All gradients.

    The tensors are BackwardTensors; the last argument is `backward_scratch` of the longest sequence.
    """
    sequences, starts, sizes, tensors, is_bf16 = unpack_args(call)
    H, P, G, N = sizes[SIZES.H], sizes[SIZES.P], sizes[SIZES.G], sizes[SIZES.N]
    rows, columns, width = round_up(P, ROWS), round_up(N, 16), BF16_BYTES if is_bf16 else F32_BYTES
    scratch = np.empty(as_i64(call)[5], dtype=np.float32)
    state = scratch.ctypes.data
    x = f32_at(state, rows * columns)
    B = f32_at(x, 4 * TOKENS * rows)
    C, sums = f32_at(B, TOKENS * columns), f32_at(B, 2 * TOKENS * columns)
    dt = f32_at(sums, TOKENS * columns)
    decay = f32_at(dt, TOKENS)
    block = Block(rows, columns, x, B, C, dt, decay)
    f, dy, df = f32_at(x, TOKENS * rows), f32_at(x, 2 * TOKENS * rows), f32_at(x, 3 * TOKENS * rows)
    gradients = Gradients(f, dy, df, sums)
    C_dC = f32_at(decay, TOKENS)  # what follows depends on the sequence's length
    total = starts[sequences] * G
    for sequence in range(sequences):
        begin, length = starts[sequence], starts[sequence + 1] - starts[sequence]
        dB, dC = f32_at(C_dC, length), f32_at(C_dC, length * (1 + columns))
        whole = Sequence(C_dC, dB, dC, f32_at(dC, length * columns), begin, length)
        for group in range(G):
            if rank_of(begin * G + group * length, total, size) != rank:
                continue
            fill_zeros(dB, 2 * length * columns)
            for head in range(group * (H // G), (group + 1) * (H // G)):
                index = sequence * H + head
                _forward_head(block, gradients, whole, state, index, head, group, sizes, tensors, is_bf16)
                _backward_head(block, gradients, whole, state, index, head, group, sizes, tensors, is_bf16)
            for i in range(length):
                at = ((begin + i) * G + group) * N * width
                store_row(f32_at(dB, i * columns), is_bf16, N, tensors[BACKWARD.dB] + at)
                store_row(f32_at(dC, i * columns), is_bf16, N, tensors[BACKWARD.dC] + at)
    keep_alive(scratch)


@inline
def _forward_head(block, gradients, whole, state, index, head, group, sizes, tensors, is_bf16):
    """Recompute the states of one head from the first token to the last, and add to dC."""
    H, P, N, rows, columns = sizes[SIZES.H], sizes[SIZES.P], sizes[SIZES.N], block.rows, block.columns
    initial, dy, sums = tensors[BACKWARD.initial], tensors[BACKWARD.dy], gradients.sums
    load_state(f32_at(initial, index * P * N) if initial else 0, P, N, state, rows, columns)
    for number in range((whole.length + TOKENS - 1) // TOKENS):
        done = number * TOKENS
        count = min(TOKENS, whole.length - done)
        load_block(block, whole.begin + done, count, head, group, sizes, tensors, is_bf16)
        load_dy(block, gradients, whole.begin + done, count, head, H, P, dy)
        fill_zeros(sums, count * columns)
        band = 0
        while band < rows:
            high = min(BAND, rows - band)
            for i in range(count):
                for row in range(band, band + high, ROWS):
                    part, at, own_sums = (
                        f32_at(state, row * columns),
                        i * rows + row,
                        f32_at(sums, i * columns),
                    )
                    B, decay = f32_at(block.B, i * columns), as_f32(block.decay)[i]
                    f, dy_rows = f32_at(gradients.f, at), f32_at(gradients.dy, at)
                    forward_step(part, B, f, dy_rows, decay, own_sums, columns)
            band += BAND
        add_into(sums, f32_at(whole.dC, done * columns), count * columns)
        for i in range(count):
            C = f32_at(block.C, i * columns)
            as_f32(whole.C_dC)[done + i] = dot(f32_at(sums, i * columns), C, columns)
        if (done + count) % ANCHOR == 0:
            anchor = ((done + count) // ANCHOR - 1) * rows * columns
            copy(state, f32_at(whole.anchors, anchor), rows * columns)


@inline
def _backward_head(block, gradients, whole, state, index, head, group, sizes, tensors, is_bf16):
    """The gradients of one head from the last token to the first.

    `state` holds the final state, then a state's gradient.
    """
    H, P, N, rows, columns = sizes[SIZES.H], sizes[SIZES.P], sizes[SIZES.N], block.rows, block.columns
    width, sums = BF16_BYTES if is_bf16 else F32_BYTES, gradients.sums
    dfinal, dy, dinitial = tensors[BACKWARD.dfinal], tensors[BACKWARD.dy], tensors[BACKWARD.dinitial]
    A, D = as_f32(tensors[BACKWARD.A])[head], as_f32(tensors[BACKWARD.D])[head]
    running = np.float32(0)
    last_anchor = f32_at(whole.anchors, (whole.length // ANCHOR) * rows * columns)
    if dfinal:
        copy(state, last_anchor, rows * columns)
    load_state(f32_at(dfinal, index * P * N) if dfinal else 0, P, N, state, rows, columns)
    if dfinal:
        running = dot(state, last_anchor, rows * columns)
    dA, dD, next_decay = np.float32(0), np.float32(0), np.float32(1)
    blocks = (whole.length + TOKENS - 1) // TOKENS
    for back in range(blocks):
        done = (blocks - 1 - back) * TOKENS
        count = min(TOKENS, whole.length - done)
        if back and (done + count) % ANCHOR == 0:
            anchor = f32_at(whole.anchors, ((done + count) // ANCHOR - 1) * rows * columns)
            running = next_decay * dot(state, anchor, rows * columns)
        load_block(block, whole.begin + done, count, head, group, sizes, tensors, is_bf16)
        load_dy(block, gradients, whole.begin + done, count, head, H, P, dy)
        fill_zeros(sums, count * columns)
        band = 0
        while band < rows:
            high = min(BAND, rows - band)
            for i in range(count - 1, -1, -1):
                decay = as_f32(block.decay)[i + 1] if i + 1 < count else next_decay
                for row in range(band, band + high, ROWS):
                    part, at, own_sums = (
                        f32_at(state, row * columns),
                        i * rows + row,
                        f32_at(sums, i * columns),
                    )
                    B, C = f32_at(block.B, i * columns), f32_at(block.C, i * columns)
                    f, dy_rows = f32_at(gradients.f, at), f32_at(gradients.dy, at)
                    df = f32_at(gradients.df, at)
                    backward_step(part, B, C, f, dy_rows, decay, own_sums, df, columns)
            band += BAND
        add_into(sums, f32_at(whole.dB, done * columns), count * columns)
        for i in range(count - 1, -1, -1):
            t, step = whole.begin + done + i, as_f32(block.dt)[i]
            B_dB = dot(f32_at(sums, i * columns), f32_at(block.B, i * columns), columns)
            running += as_f32(whole.C_dC)[done + i] - B_dB
            x, dy_row, df = (
                f32_at(block.x, i * rows),
                f32_at(gradients.dy, i * rows),
                f32_at(gradients.df, i * rows),
            )
            as_f32(tensors[BACKWARD.ddt])[t * H + head] = running * A + dot(df, x, P)
            dA += running * step
            dD += dot(dy_row, x, P)
            slope, out = as_f32(dy_row), as_f32(df)
            for p in range(P):
                out[p] = out[p] * step + D * slope[p]
            store_row(df, is_bf16, P, tensors[BACKWARD.dx] + (t * H + head) * P * width)
        next_decay = as_f32(block.decay)[0]
    as_f32(tensors[BACKWARD.dA])[index] = dA
    as_f32(tensors[BACKWARD.dD])[index] = dD
    if dinitial:
        out = as_f32(f32_at(dinitial, index * P * N))
        for row in range(P):
            dS = as_f32(f32_at(state, row * columns))
            for n in range(N):
                out[row * N + n] = next_decay * dS[n]


def backward_scratch(P: int, N: int, longest: int) -> int:
    """fp32 numbers of scratch of one thread in `scan_backward`; `longest`: tokens of the longest sequence."""
    rows, columns = -(-P // ROWS) * ROWS, -(-N // 16) * 16
    per_block = rows * columns + TOKENS * (4 * rows + 3 * columns + 2)
    return per_block + longest * (1 + 2 * columns) + (longest // ANCHOR + 1) * rows * columns
