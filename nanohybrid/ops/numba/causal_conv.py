"""The causal convolution with its SiLU, and their gradient, in one pass each over blocks of channels.

    a_t = bias + sum_k weight[W-1-k] x_{t-k}      y_t = silu(a_t)

The backward pass recomputes a from x. Threads partition the channels, so one thread computes a weight's
gradient as a sum over all tokens in order: the bits do not depend on the number of threads. Weights are [W,
C], tap by tap.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.numba.jit import inline, kernel
from nanohybrid.ops.numba.memory import BF16_BYTES, F32_BYTES, as_f32, as_i64, f32_at, i64_at, keep_alive
from nanohybrid.ops.numba.panels import silu
from nanohybrid.ops.numba.rows import copy, fill_zeros, load_row, store_row
from nanohybrid.ops.numba.scalars import exp
from nanohybrid.ops.numba.threads import partition

CHANNELS = 256  # of a block, at most: W tokens of them and their gradients stay in the L1 cache


@inline
def ring_index(slot, k, window):
    """The slot of the token k before the one in `slot`, in a ring of `window` slots."""
    return slot - k if slot >= k else slot - k + window


@inline
def block_width(channels, size):
    """Channels of a block, so that every thread has some."""
    each = (channels + size - 1) // size
    return min(CHANNELS, (each + 15) // 16 * 16)


@inline
def conv_at(t, ring, weight, bias, channels, first, count, window, out):
    """a_t of the `count` channels from `first` on; `ring` holds the last W inputs."""
    total, offset = as_f32(out), as_f32(f32_at(bias, first))
    for i in range(count):
        total[i] = offset[i]
    slot = t % window
    for k in range(min(window, t + 1)):
        x = as_f32(f32_at(ring, ring_index(slot, k, window) * CHANNELS))
        gain = as_f32(f32_at(weight, (window - 1 - k) * channels + first))
        for i in range(count):
            total[i] += gain[i] * x[i]


@inline
def unpack_args(call):
    """The first arguments of both kernels: sequences, starts, C, W, x's row stride, x, weight, bias."""
    w = as_i64(call)
    return w[0], as_i64(w[1]), w[2], w[3], w[4], w[5], w[6], w[7]


@kernel
def conv_forward(rank, size, control, call):
    """y [T, C] = silu(conv(x)).

    The rows of x are `stride` apart; x and y are bfloat16 where `is_bf16`, else fp32.
    """
    sequences, starts, channels, window, stride, x, weight, bias = unpack_args(call)
    y, is_bf16 = as_i64(call)[8], as_i64(call)[9]
    scratch = np.empty((window + 1) * CHANNELS, dtype=np.float32)
    ring, element_bytes = scratch.ctypes.data, BF16_BYTES if is_bf16 else F32_BYTES
    total = f32_at(ring, window * CHANNELS)
    width = block_width(channels, size)
    first, last = partition((channels + width - 1) // width, rank, size)
    for block in range(first, last):
        c = block * width
        count = min(width, channels - c)
        for sequence in range(sequences):
            begin = starts[sequence]
            for t in range(starts[sequence + 1] - begin):
                source = x + ((begin + t) * stride + c) * element_bytes
                load_row(source, is_bf16, count, f32_at(ring, t % window * CHANNELS), count)
                conv_at(t, ring, weight, bias, channels, c, count, window, total)
                out = as_f32(total)
                for i in range(count):
                    out[i] = silu(out[i])
                store_row(total, is_bf16, count, y + ((begin + t) * channels + c) * element_bytes)
    keep_alive(scratch)


@kernel
def conv_backward(rank, size, control, call):
    """dx [T, C] in the dtype of x; dweight [W, C] and dbias [C] in fp32.

    A token's dx is complete once the W - 1 tokens after it have been read; until then it is summed in a ring.
    """
    sequences, starts, channels, window, stride, x, weight, bias = unpack_args(call)
    more = as_i64(i64_at(call, 8))
    dy, dx, dweight, dbias, is_bf16 = more[0], more[1], more[2], more[3], more[4]
    scratch = np.empty((3 * window + 3) * CHANNELS, dtype=np.float32)
    ring, element_bytes = scratch.ctypes.data, BF16_BYTES if is_bf16 else F32_BYTES
    dx_ring, weight_sums = f32_at(ring, window * CHANNELS), f32_at(ring, 2 * window * CHANNELS)
    bias_sums = f32_at(weight_sums, window * CHANNELS)
    total, grad = f32_at(bias_sums, CHANNELS), f32_at(bias_sums, 2 * CHANNELS)
    width = block_width(channels, size)
    first, last = partition((channels + width - 1) // width, rank, size)
    for block in range(first, last):
        c = block * width
        count = min(width, channels - c)
        fill_zeros(weight_sums, (window + 1) * CHANNELS)
        for sequence in range(sequences):
            begin, length = starts[sequence], starts[sequence + 1] - starts[sequence]
            for t in range(length):
                slot = t % window
                source = x + ((begin + t) * stride + c) * element_bytes
                load_row(source, is_bf16, count, f32_at(ring, slot * CHANNELS), count)
                source = dy + ((begin + t) * channels + c) * element_bytes
                load_row(source, is_bf16, count, grad, count)
                conv_at(t, ring, weight, bias, channels, c, count, window, total)
                silu_gradient(total, grad, bias_sums, count)
                fill_zeros(f32_at(dx_ring, slot * CHANNELS), count)
                for k in range(min(window, t + 1)):
                    tap, at = window - 1 - k, ring_index(slot, k, window) * CHANNELS
                    x_k, gain = as_f32(f32_at(ring, at)), as_f32(f32_at(weight, tap * channels + c))
                    dx_k, dweight_k = as_f32(f32_at(dx_ring, at)), as_f32(f32_at(weight_sums, tap * CHANNELS))
                    da = as_f32(grad)
                    for i in range(count):
                        dx_k[i] += gain[i] * da[i]
                        dweight_k[i] += x_k[i] * da[i]
                if t >= window - 1:
                    done = t - window + 1
                    target = dx + ((begin + done) * channels + c) * element_bytes
                    store_row(f32_at(dx_ring, done % window * CHANNELS), is_bf16, count, target)
            for done in range(max(0, length - window + 1), length):
                target = dx + ((begin + done) * channels + c) * element_bytes
                store_row(f32_at(dx_ring, done % window * CHANNELS), is_bf16, count, target)
        for k in range(window):
            copy(f32_at(weight_sums, k * CHANNELS), f32_at(dweight, k * channels + c), count)
        copy(bias_sums, f32_at(dbias, c), count)
    keep_alive(scratch)


@inline
def silu_gradient(total, grad, bias_sums, count):
    """grad: dy on entry, dy silu'(a) on return, which is also added to the bias's gradient."""
    a, da, sums = as_f32(total), as_f32(grad), as_f32(bias_sums)
    one = np.float32(1)
    for i in range(count):
        sigmoid = one / (one + exp(-a[i]))
        da[i] = da[i] * sigmoid * (one + a[i] * (one - sigmoid))
        sums[i] += da[i]
