"""The squared ReLU and the cross-entropy of rows of logits, each with its gradient in one pass."""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inline, kernel
from nanohybrid.ops.numba.memory import BF16_BYTES, F32_BYTES, as_f32, as_i64, f32_at, keep_alive
from nanohybrid.ops.numba.rows import load_row, store_row
from nanohybrid.ops.numba.scalars import exp
from nanohybrid.ops.numba.threads import partition

BLOCK = 2048  # numbers at a time
LANES = 64  # maxima side by side, so that the loop vectorizes


@kernel
def relu2_forward(rank, size, control, call):
    """y = max(x, 0)^2 of `count` numbers, bfloat16 where `is_bf16`, else fp32."""
    args = as_i64(call)
    count, x, y, is_bf16 = args[0], args[1], args[2], args[3]
    scratch = np.empty(BLOCK, dtype=np.float32)
    values, width = scratch.ctypes.data, BF16_BYTES if is_bf16 else F32_BYTES
    first, last = partition((count + BLOCK - 1) // BLOCK, rank, size)
    for block in range(first, last):
        at, length = block * BLOCK * width, min(BLOCK, count - block * BLOCK)
        load_row(x + at, is_bf16, length, values, length)
        v = as_f32(values)
        for i in range(length):
            positive = v[i] if not (v[i] < np.float32(0)) else np.float32(0)  # NaN stays NaN
            v[i] = positive * positive
        store_row(values, is_bf16, length, y + at)
    keep_alive(scratch)


@kernel
def relu2_backward(rank, size, control, call):
    """dx = 2 max(x, 0) dy of `count` numbers, bfloat16 where `is_bf16`, else fp32."""
    args = as_i64(call)
    count, x, dy, dx, is_bf16 = args[0], args[1], args[2], args[3], args[4]
    scratch = np.empty(2 * BLOCK, dtype=np.float32)
    values, width = scratch.ctypes.data, BF16_BYTES if is_bf16 else F32_BYTES
    grads = f32_at(values, BLOCK)
    first, last = partition((count + BLOCK - 1) // BLOCK, rank, size)
    for block in range(first, last):
        at, length = block * BLOCK * width, min(BLOCK, count - block * BLOCK)
        load_row(x + at, is_bf16, length, values, length)
        load_row(dy + at, is_bf16, length, grads, length)
        v, d = as_f32(values), as_f32(grads)
        for i in range(length):
            positive = v[i] if not (v[i] < np.float32(0)) else np.float32(0)
            d[i] = np.float32(2) * positive * d[i]
        store_row(grads, is_bf16, length, dx + at)
    keep_alive(scratch)


@inline
def row_max(values, lanes, count):
    """The maximum of `count` numbers; NaN is ignored. lanes: scratch for LANES numbers."""
    v, maxima = as_f32(values), as_f32(lanes)
    for lane in range(LANES):
        maxima[lane] = np.float32(-np.inf)
    whole = count // LANES
    for block in range(whole):
        for lane in range(LANES):
            value = v[block * LANES + lane]
            maxima[lane] = value if value > maxima[lane] else maxima[lane]
    for i in range(whole * LANES, count):
        maxima[0] = v[i] if v[i] > maxima[0] else maxima[0]
    result = maxima[0]
    for lane in range(1, LANES):
        result = maxima[lane] if maxima[lane] > result else result
    return result


@kernel
def cross_entropy_rows(rank, size, control, call):
    """loss [rows] = logsumexp(logits) - logits[target], in fp32.

    Where `with_gradient`, the gradient softmax - onehot overwrites the logits, which are bfloat16 where
    `is_bf16`, else fp32.
    """
    args = as_i64(call)
    rows, vocabulary, stride, logits = args[0], args[1], args[2], args[3]
    targets, loss, with_gradient, is_bf16 = args[4], args[5], args[6], args[7]
    scratch = np.empty(vocabulary + LANES, dtype=np.float32)
    values, width, one = scratch.ctypes.data, BF16_BYTES if is_bf16 else F32_BYTES, np.float32(1)
    lanes = f32_at(values, vocabulary)
    first, last = partition(rows, rank, size)
    for row in range(first, last):
        at, target = logits + row * stride * width, as_i64(targets)[row]
        load_row(at, is_bf16, vocabulary, values, vocabulary)
        top, v = row_max(values, lanes, vocabulary), as_f32(values)
        picked, total = v[target], np.float32(0)
        for i in range(vocabulary):
            v[i] = exp(v[i] - top)
            total += v[i]
        as_f32(loss)[row] = np.float32(math.log(total)) + top - picked
        if with_gradient:
            inverse = one / total
            for i in range(vocabulary):
                v[i] *= inverse
            v[target] -= one
            store_row(values, is_bf16, vocabulary, at)
    keep_alive(scratch)
