"""The SSD scan and its gradient for training on a CPU: token by token, a few rows of one head's state in the first level of the cache.

That costs about the products of the form in chunks, and none of its passes over [tokens, heads, chunk] matrices; nothing but the
inputs is kept for the gradient. With f = dt x and E the gradient of a state:

    S_t = exp(dt_t A) S_{t-1} + f_t B_t^T        y_t = S_t C_t + D x_t
    E_t = exp(dt_{t+1} A) E_{t+1} + dy_t C_t^T   df_t = E_t B_t   dB_t = E_t^T f_t   dC_t = S_t^T dy_t

The decay's gradient is a running sum from the end, g_t = g_{t+1} + dC_t . C_t - dB_t . B_t of this head's share alone. It is a
difference of large numbers, so every ANCHOR tokens it is set anew to what it is, exp(dt_{t+1} A) E_{t+1} . S_t.

A sequence and a group of heads are what threads share out: dB and dC are sums over a group's heads, so that nobody adds to what
another writes, and the sums' order does not depend on how many threads there are.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import floats, hold, words
from nanohybrid.ops.numba.rows import add_rows, clear, copy, dot, load_row, store_row
from nanohybrid.ops.numba.ssd_scan_rows import ROWS, advance, retreat
from nanohybrid.ops.numba.vectors import state_rows

TOKENS = 16  # of one head at a time
BAND = 16  # rows of a state that go through these tokens together: with their B and C they stay in 32 KiB
ANCHOR = 64  # tokens between two states that the gradient keeps, a multiple of TOKENS


@inlined
def up_to(count, multiple):
    return (count + multiple - 1) // multiple * multiple


@inlined
def load_state(source, rows, columns, out, padded_rows, padded):
    """A state [rows, columns], or zeros where there is none, padded with zeros."""
    if source == 0:
        clear(out, padded_rows * padded)
        return
    for row in range(rows):
        load_row(source + row * columns * 4, False, columns, out + row * padded * 4, padded)
    clear(out + rows * padded * 4, (padded_rows - rows) * padded)


@inlined
def load_tokens(token, here, head, group, sizes, at, half, x, B, C, steps, decays, rows, columns):
    """x, B and C of `here` tokens as padded fp32 rows, and each one's step and decay."""
    H, P, N = sizes[0], sizes[1], sizes[3]
    width = 2 if half else 4
    dt, rate, step, kept = floats(at[1]), floats(at[2])[head], floats(steps), floats(decays)
    for i in range(here):
        t = token + i
        load_row(at[0] + (t * sizes[4] + head * P) * width, half, P, x + i * rows * 4, rows)
        load_row(at[3] + (t * sizes[5] + group * N) * width, half, N, B + i * columns * 4, columns)
        load_row(at[4] + (t * sizes[6] + group * N) * width, half, N, C + i * columns * 4, columns)
        step[i] = dt[t * H + head]
        kept[i] = np.float32(math.exp(step[i] * rate))


@inlined
def given(call):
    """What both kernels are told first."""
    w = words(call)
    return w[0], words(w[1]), words(w[2]), words(w[3]), w[4]


@kernel
def scan_forward(rank, size, barrier, call):
    """y [T, H, P] in fp32 and, where wanted, final states. sizes: H, P, G, N, rows of x, B and C apart; at: x, dt, A, B, C, D, initial,
    final, y."""
    sequences, starts, sizes, at, half = given(call)
    H, P, G, N = sizes[0], sizes[1], sizes[2], sizes[3]
    rows, columns = up_to(P, ROWS), up_to(N, 16)
    room = np.empty(rows * columns + TOKENS * (2 * rows + 2 * columns + 2), dtype=np.float32)
    state = room.ctypes.data
    x = state + rows * columns * 4
    y, B = x + TOKENS * rows * 4, x + TOKENS * rows * 8
    C = B + TOKENS * columns * 4
    steps = C + TOKENS * columns * 4
    decays = steps + TOKENS * 4
    total, D, out = starts[sequences] * G, floats(at[5]), floats(at[8])
    for sequence in range(sequences):
        begin, length = starts[sequence], starts[sequence + 1] - starts[sequence]
        for group in range(G):
            if (begin * G + group * length) * size // total != rank:
                continue
            for head in range(group * (H // G), (group + 1) * (H // G)):
                place = (sequence * H + head) * P * N * 4
                load_state(at[6] + place if at[6] else 0, P, N, state, rows, columns)
                done = 0
                while done < length:
                    here = min(TOKENS, length - done)
                    load_tokens(
                        begin + done,
                        here,
                        head,
                        group,
                        sizes,
                        at,
                        half,
                        x,
                        B,
                        C,
                        steps,
                        decays,
                        rows,
                        columns,
                    )
                    band = 0
                    while band < rows:
                        high = min(BAND, rows - band)
                        for i in range(here):
                            mine = i * rows * 4 + band * 4
                            part = state + band * columns * 4
                            decay, dt = floats(decays)[i], floats(steps)[i]
                            state_rows(
                                part,
                                x + mine,
                                B + i * columns * 4,
                                C + i * columns * 4,
                                y + mine,
                                decay,
                                dt,
                                high,
                                columns,
                            )
                        band += BAND
                    for i in range(here):
                        skip, mine, read = D[head], floats(x + i * rows * 4), floats(y + i * rows * 4)
                        where = ((begin + done + i) * H + head) * P
                        for p in range(P):
                            out[where + p] = read[p] + skip * mine[p]
                    done += here
                if at[7]:
                    for row in range(P):
                        store_row(state + row * columns * 4, False, N, at[7] + place + row * N * 4)
    hold(room)


@kernel
def scan_backward(rank, size, barrier, call):
    """Every gradient. at: x, dt, A, B, C, D, initial, dy, dfinal, then dx, ddt, dB, dC, dinitial, and a row [H] of dA and of dD a sequence.

    dy and ddt are fp32, dx, dB and dC in the dtype of x, B and C; `room_numbers`: fp32 of scratch for the longest sequence.
    """
    sequences, starts, sizes, at, half = given(call)
    room_numbers = words(call)[5]
    H, P, G, N = sizes[0], sizes[1], sizes[2], sizes[3]
    rows, columns, width = up_to(P, ROWS), up_to(N, 16), 2 if half else 4
    room = np.empty(room_numbers, dtype=np.float32)
    state = room.ctypes.data
    x = state + rows * columns * 4
    fed, dy, dfed = x + TOKENS * rows * 4, x + 2 * TOKENS * rows * 4, x + 3 * TOKENS * rows * 4
    B = dfed + TOKENS * rows * 4
    C, sums = B + TOKENS * columns * 4, B + 2 * TOKENS * columns * 4
    steps = sums + TOKENS * columns * 4
    decays = steps + TOKENS * 4
    longest = decays + TOKENS * 4  # what depends on the sequence's length
    total, skips = starts[sequences] * G, floats(at[5])
    for sequence in range(sequences):
        begin, length = starts[sequence], starts[sequence + 1] - starts[sequence]
        read, dB, dC = longest, longest + length * 4, longest + length * (1 + columns) * 4
        anchors = dC + length * columns * 4
        blocks = (length + TOKENS - 1) // TOKENS
        for group in range(G):
            if (begin * G + group * length) * size // total != rank:
                continue
            clear(dB, 2 * length * columns)
            for head in range(group * (H // G), (group + 1) * (H // G)):
                place, rate, skip = (sequence * H + head) * P * N * 4, floats(at[2])[head], skips[head]
                # 1. forwards: states, what each token read of them, and dC
                load_state(at[6] + place if at[6] else 0, P, N, state, rows, columns)
                for block in range(blocks):
                    done = block * TOKENS
                    here = min(TOKENS, length - done)
                    load_tokens(
                        begin + done,
                        here,
                        head,
                        group,
                        sizes,
                        at,
                        half,
                        x,
                        B,
                        C,
                        steps,
                        decays,
                        rows,
                        columns,
                    )
                    load_slopes(begin + done, here, head, H, P, at[7], x, steps, fed, dy, rows)
                    clear(sums, here * columns)
                    band = 0
                    while band < rows:
                        high = min(BAND, rows - band)
                        for i in range(here):
                            for row in range(band, band + high, ROWS):
                                part, mine, wide = (
                                    state + row * columns * 4,
                                    (i * rows + row) * 4,
                                    i * columns * 4,
                                )
                                advance(
                                    part,
                                    B + wide,
                                    fed + mine,
                                    dy + mine,
                                    floats(decays)[i],
                                    sums + wide,
                                    columns,
                                )
                        band += BAND
                    add_rows(sums, dC + done * columns * 4, here * columns)
                    for i in range(here):
                        floats(read)[done + i] = dot(sums + i * columns * 4, C + i * columns * 4, columns)
                    if (done + here) % ANCHOR == 0:
                        copy(
                            state,
                            anchors + ((done + here) // ANCHOR - 1) * rows * columns * 4,
                            rows * columns,
                        )
                # 2. backwards: the state's gradient, and all that hangs on it
                running = np.float32(0)
                if at[8]:
                    copy(state, anchors + (length // ANCHOR) * rows * columns * 4, rows * columns)
                load_state(at[8] + place if at[8] else 0, P, N, state, rows, columns)
                if at[8]:
                    running = dot(state, anchors + (length // ANCHOR) * rows * columns * 4, rows * columns)
                dA, dD, later = np.float32(0), np.float32(0), np.float32(1)
                for back in range(blocks):
                    done = (blocks - 1 - back) * TOKENS
                    here = min(TOKENS, length - done)
                    if back and (done + here) % ANCHOR == 0:
                        whole = anchors + ((done + here) // ANCHOR - 1) * rows * columns * 4
                        running = later * dot(state, whole, rows * columns)
                    load_tokens(
                        begin + done,
                        here,
                        head,
                        group,
                        sizes,
                        at,
                        half,
                        x,
                        B,
                        C,
                        steps,
                        decays,
                        rows,
                        columns,
                    )
                    load_slopes(begin + done, here, head, H, P, at[7], x, steps, fed, dy, rows)
                    clear(sums, here * columns)
                    band = 0
                    while band < rows:
                        high = min(BAND, rows - band)
                        for i in range(here - 1, -1, -1):
                            decay = floats(decays)[i + 1] if i + 1 < here else later
                            for row in range(band, band + high, ROWS):
                                part, mine, wide = (
                                    state + row * columns * 4,
                                    (i * rows + row) * 4,
                                    i * columns * 4,
                                )
                                retreat(
                                    part,
                                    B + wide,
                                    C + wide,
                                    fed + mine,
                                    dy + mine,
                                    decay,
                                    sums + wide,
                                    dfed + mine,
                                    columns,
                                )
                        band += BAND
                    add_rows(sums, dB + done * columns * 4, here * columns)
                    for i in range(here - 1, -1, -1):
                        t, step = begin + done + i, floats(steps)[i]
                        running += floats(read)[done + i] - dot(
                            sums + i * columns * 4, B + i * columns * 4, columns
                        )
                        mine = i * rows * 4
                        floats(at[10])[t * H + head] = running * rate + dot(dfed + mine, x + mine, P)
                        dA += running * step
                        dD += dot(dy + mine, x + mine, P)
                        slope, fed_slope = floats(dy + mine), floats(dfed + mine)
                        for p in range(P):
                            fed_slope[p] = fed_slope[p] * step + skip * slope[p]
                        store_row(dfed + mine, half, P, at[9] + (t * H + head) * P * width)
                    later = floats(decays)[0]
                floats(at[14])[sequence * H + head] = dA
                floats(at[15])[sequence * H + head] = dD
                if at[13]:
                    put = floats(at[13] + place)
                    for row in range(P):
                        kept = floats(state + row * columns * 4)
                        for n in range(N):
                            put[row * N + n] = later * kept[n]
            for i in range(length):
                where = ((begin + i) * G + group) * N * width
                store_row(dB + i * columns * 4, half, N, at[11] + where)
                store_row(dC + i * columns * 4, half, N, at[12] + where)
    hold(room)


@inlined
def load_slopes(token, here, head, H, P, source, x, steps, fed, dy, rows):
    """dy of `here` tokens as padded rows, and what they fed into the state."""
    for i in range(here):
        load_row(source + ((token + i) * H + head) * P * 4, False, P, dy + i * rows * 4, rows)
        step, inputs, out = floats(steps)[i], floats(x + i * rows * 4), floats(fed + i * rows * 4)
        for p in range(rows):
            out[p] = step * inputs[p]


def backward_room(P: int, N: int, longest: int) -> int:
    """fp32 numbers of scratch of one thread in `scan_backward`."""
    rows, columns = -(-P // ROWS) * ROWS, -(-N // 16) * 16
    fixed = rows * columns + TOKENS * (4 * rows + 3 * columns + 2)
    return fixed + longest * (1 + 2 * columns) + (longest // ANCHOR + 1) * rows * columns
