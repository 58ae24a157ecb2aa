"""The causal convolution with its SiLU and their gradient in one pass each, a few channels of all tokens at a time.

    a_t = bias + sum_k weight[W-1-k] x_{t-k}      y_t = silu(a_t)

Backwards a is made again from x. Threads share out channels, so that a weight's gradient is one thread's sum over all tokens in
their order: the same bits however many threads there are. Weights come as [W, C], tap by tap.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import floats, hold, words
from nanohybrid.ops.numba.panels import silu
from nanohybrid.ops.numba.rows import clear, copy, load_row, store_row
from nanohybrid.ops.numba.scalars import exp
from nanohybrid.ops.numba.threads import share

CHANNELS = 256  # at a time, at most: W tokens of them and their slopes stay in the first level


@inlined
def back(slot, k, window):
    """The slot of the token k before the one in `slot`, of a ring of `window`."""
    return slot - k if slot >= k else slot - k + window


@inlined
def block_width(channels, size):
    """Channels at a time, so that every thread has some."""
    each = (channels + size - 1) // size
    return min(CHANNELS, (each + 15) // 16 * 16)


@inlined
def window_sum(t, ring, weight, bias, channels, first, count, window, out):
    """a_t of `count` channels from `first` on; `ring` holds the last W inputs."""
    total, offset = floats(out), floats(bias + first * 4)
    for i in range(count):
        total[i] = offset[i]
    slot = t % window
    for k in range(min(window, t + 1)):
        seen, gain = (
            floats(ring + back(slot, k, window) * CHANNELS * 4),
            floats(weight + ((window - 1 - k) * channels + first) * 4),
        )
        for i in range(count):
            total[i] += gain[i] * seen[i]


@inlined
def given(call):
    """What both kernels are told first: sequences, where each starts, and how x and the weights lie."""
    w = words(call)
    return w[0], words(w[1]), w[2], w[3], w[4], w[5], w[6], w[7]


@kernel
def conv_forward(rank, size, barrier, call):
    """y [T, C] = silu(conv(x)); x's rows are `stride` apart, both in bfloat16 where `half`, else in fp32."""
    sequences, starts, channels, window, stride, x, weight, bias = given(call)
    y, half = words(call)[8], words(call)[9]
    room = np.empty((window + 1) * CHANNELS, dtype=np.float32)
    ring, width = room.ctypes.data, 2 if half else 4
    total = ring + window * CHANNELS * 4
    width_c = block_width(channels, size)
    first, last = share((channels + width_c - 1) // width_c, rank, size)
    for block in range(first, last):
        c = block * width_c
        count = min(width_c, channels - c)
        for sequence in range(sequences):
            begin = starts[sequence]
            for t in range(starts[sequence + 1] - begin):
                load_row(
                    x + ((begin + t) * stride + c) * width,
                    half,
                    count,
                    ring + t % window * CHANNELS * 4,
                    count,
                )
                window_sum(t, ring, weight, bias, channels, c, count, window, total)
                out = floats(total)
                for i in range(count):
                    out[i] = silu(out[i])
                store_row(total, half, count, y + ((begin + t) * channels + c) * width)
    hold(room)


@kernel
def conv_backward(rank, size, barrier, call):
    """dx [T, C] in the dtype of x, dweight [W, C] and dbias [C] in fp32. A token's dx is whole once W tokens have been seen."""
    sequences, starts, channels, window, stride, x, weight, bias = given(call)
    more = words(call + 8 * 8)
    dy, dx, dweight, dbias, half = more[0], more[1], more[2], more[3], more[4]
    room = np.empty((3 * window + 3) * CHANNELS, dtype=np.float32)
    ring, width = room.ctypes.data, 2 if half else 4
    pending, taps = ring + window * CHANNELS * 4, ring + 2 * window * CHANNELS * 4
    shift = taps + window * CHANNELS * 4
    total, slope = shift + CHANNELS * 4, shift + 2 * CHANNELS * 4
    width_c = block_width(channels, size)
    first, last = share((channels + width_c - 1) // width_c, rank, size)
    for block in range(first, last):
        c = block * width_c
        count = min(width_c, channels - c)
        clear(taps, (window + 1) * CHANNELS)
        for sequence in range(sequences):
            begin, length = starts[sequence], starts[sequence + 1] - starts[sequence]
            for t in range(length):
                now = t % window
                slot = now * CHANNELS * 4
                load_row(x + ((begin + t) * stride + c) * width, half, count, ring + slot, count)
                load_row(dy + ((begin + t) * channels + c) * width, half, count, slope, count)
                window_sum(t, ring, weight, bias, channels, c, count, window, total)
                through_silu(total, slope, shift, count)
                clear(pending + slot, count)
                for k in range(min(window, t + 1)):
                    away = back(now, k, window) * CHANNELS * 4
                    seen, gain = floats(ring + away), floats(weight + ((window - 1 - k) * channels + c) * 4)
                    reach, tap, da = (
                        floats(pending + away),
                        floats(taps + (window - 1 - k) * CHANNELS * 4),
                        floats(slope),
                    )
                    for i in range(count):
                        reach[i] += gain[i] * da[i]
                        tap[i] += seen[i] * da[i]
                if t >= window - 1:
                    done = t - window + 1
                    store_row(
                        pending + done % window * CHANNELS * 4,
                        half,
                        count,
                        dx + ((begin + done) * channels + c) * width,
                    )
            for done in range(max(0, length - window + 1), length):
                store_row(
                    pending + done % window * CHANNELS * 4,
                    half,
                    count,
                    dx + ((begin + done) * channels + c) * width,
                )
        for k in range(window):
            copy(taps + k * CHANNELS * 4, dweight + (k * channels + c) * 4, count)
        copy(shift, dbias + c * 4, count)
    hold(room)


@inlined
def through_silu(total, slope, shift, count):
    """slope = dy silu'(a), added to `shift`, the bias's gradient."""
    a, da, sum_ = floats(total), floats(slope), floats(shift)
    one = np.float32(1)
    for i in range(count):
        gate = one / (one + exp(-a[i]))
        da[i] = da[i] * gate * (one + a[i] * (one - gate))
        sum_[i] += da[i]
