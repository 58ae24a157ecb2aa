"""The squared ReLU and its gradient, and the loss of a row of logits with its slope, in one pass over memory each."""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import floats, hold, words
from nanohybrid.ops.numba.rows import load_row, store_row
from nanohybrid.ops.numba.scalars import exp
from nanohybrid.ops.numba.threads import share

BLOCK = 2048  # numbers at a time
LANES = 64  # maxima side by side, so that the loop is one of vectors


@kernel
def relu2_forward(rank, size, barrier, call):
    """y = max(x, 0)^2 of `count` numbers."""
    given = words(call)
    count, x, y, half = given[0], given[1], given[2], given[3]
    room = np.empty(BLOCK, dtype=np.float32)
    values, width = room.ctypes.data, 2 if half else 4
    first, last = share((count + BLOCK - 1) // BLOCK, rank, size)
    for block in range(first, last):
        at, here = block * BLOCK * width, min(BLOCK, count - block * BLOCK)
        load_row(x + at, half, here, values, here)
        v = floats(values)
        for i in range(here):
            positive = v[i] if not (v[i] < np.float32(0)) else np.float32(0)  # what is no number stays none
            v[i] = positive * positive
        store_row(values, half, here, y + at)
    hold(room)


@kernel
def relu2_backward(rank, size, barrier, call):
    """dx = 2 max(x, 0) dy of `count` numbers."""
    given = words(call)
    count, x, dy, dx, half = given[0], given[1], given[2], given[3], given[4]
    room = np.empty(2 * BLOCK, dtype=np.float32)
    values, width = room.ctypes.data, 2 if half else 4
    slopes = values + BLOCK * 4
    first, last = share((count + BLOCK - 1) // BLOCK, rank, size)
    for block in range(first, last):
        at, here = block * BLOCK * width, min(BLOCK, count - block * BLOCK)
        load_row(x + at, half, here, values, here)
        load_row(dy + at, half, here, slopes, here)
        v, d = floats(values), floats(slopes)
        for i in range(here):
            positive = v[i] if not (v[i] < np.float32(0)) else np.float32(0)
            d[i] = np.float32(2) * positive * d[i]
        store_row(slopes, half, here, dx + at)
    hold(room)


@inlined
def largest(values, lanes, count):
    """The maximum of `count` numbers; what is no number is passed over."""
    v, most = floats(values), floats(lanes)
    for lane in range(LANES):
        most[lane] = np.float32(-np.inf)
    whole = count // LANES
    for block in range(whole):
        for lane in range(LANES):
            here = v[block * LANES + lane]
            most[lane] = here if here > most[lane] else most[lane]
    for i in range(whole * LANES, count):
        most[0] = v[i] if v[i] > most[0] else most[0]
    found = most[0]
    for lane in range(1, LANES):
        found = most[lane] if most[lane] > found else found
    return found


@kernel
def cross_entropy_rows(rank, size, barrier, call):
    """loss [rows] = logsumexp - the target's logit; with `slope`, softmax - onehot is written over the logits."""
    given = words(call)
    rows, vocabulary, stride, logits = given[0], given[1], given[2], given[3]
    targets, loss, slope, half = given[4], given[5], given[6], given[7]
    room = np.empty(vocabulary + LANES, dtype=np.float32)
    values, width, one = room.ctypes.data, 2 if half else 4, np.float32(1)
    lanes = values + vocabulary * 4
    first, last = share(rows, rank, size)
    for row in range(first, last):
        at, target = logits + row * stride * width, words(targets)[row]
        load_row(at, half, vocabulary, values, vocabulary)
        top, v = largest(values, lanes, vocabulary), floats(values)
        picked, total = v[target], np.float32(0)
        for i in range(vocabulary):
            v[i] = exp(v[i] - top)
            total += v[i]
        floats(loss)[row] = np.float32(math.log(total)) + top - picked
        if slope:
            share_ = one / total
            for i in range(vocabulary):
                v[i] *= share_
            v[target] -= one
            store_row(values, half, vocabulary, at)
    hold(room)
