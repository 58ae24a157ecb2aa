"""Runs of numbers in fp32, the working form of training's loops: from and to memory in bfloat16 or fp32, and what is done to whole runs."""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.numba.jit import inlined
from nanohybrid.ops.numba.llvm import floats, halves
from nanohybrid.ops.numba.scalars import narrow, widen


@inlined
def load_row(source, half, count, out, padded):
    """`count` numbers, bfloat16 or fp32, as fp32, and zeros up to `padded`."""
    target = floats(out)
    if half:
        words = halves(source)
        for i in range(count):
            target[i] = widen(words[i])
    else:
        numbers = floats(source)
        for i in range(count):
            target[i] = numbers[i]
    for i in range(count, padded):
        target[i] = np.float32(0)


@inlined
def store_row(values, half, count, out):
    """The inverse of `load_row`."""
    numbers = floats(values)
    if half:
        words = halves(out)
        for i in range(count):
            words[i] = narrow(numbers[i])
    else:
        target = floats(out)
        for i in range(count):
            target[i] = numbers[i]


@inlined
def clear(values, count):
    target = floats(values)
    for i in range(count):
        target[i] = np.float32(0)


@inlined
def copy(values, out, count):
    source, target = floats(values), floats(out)
    for i in range(count):
        target[i] = source[i]


@inlined
def add_rows(values, out, count):
    source, target = floats(values), floats(out)
    for i in range(count):
        target[i] += source[i]


@inlined
def dot(x, y, count):
    a, b = floats(x), floats(y)
    total = np.float32(0)
    for i in range(count):
        total += a[i] * b[i]
    return total
