"""Rows of fp32 numbers, in which the training loops compute: loads, stores and row operations."""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.numba.jit import inline
from nanohybrid.ops.numba.memory import as_bf16, as_f32
from nanohybrid.ops.numba.scalars import bf16_to_f32, f32_to_bf16


@inline
def load_row(source, is_bf16, count, out, padded):
    """`count` numbers, bfloat16 or fp32, to fp32 `out`, then zeros up to `padded` numbers."""
    target = as_f32(out)
    if is_bf16:
        bits = as_bf16(source)
        for i in range(count):
            target[i] = bf16_to_f32(bits[i])
    else:
        numbers = as_f32(source)
        for i in range(count):
            target[i] = numbers[i]
    for i in range(count, padded):
        target[i] = np.float32(0)


@inline
def store_row(values, is_bf16, count, out):
    """`count` fp32 numbers to `out`, in bfloat16 or fp32."""
    numbers = as_f32(values)
    if is_bf16:
        bits = as_bf16(out)
        for i in range(count):
            bits[i] = f32_to_bf16(numbers[i])
    else:
        target = as_f32(out)
        for i in range(count):
            target[i] = numbers[i]


@inline
def fill_zeros(values, count):
    """values = 0, fp32."""
    target = as_f32(values)
    for i in range(count):
        target[i] = np.float32(0)


@inline
def copy(values, out, count):
    """out = values, fp32."""
    source, target = as_f32(values), as_f32(out)
    for i in range(count):
        target[i] = source[i]


@inline
def add_into(values, out, count):
    """out += values, fp32."""
    source, target = as_f32(values), as_f32(out)
    for i in range(count):
        target[i] += source[i]


@inline
def dot(x, y, count):
    """The dot product of two fp32 rows, in fp32."""
    a, b = as_f32(x), as_f32(y)
    total = np.float32(0)
    for i in range(count):
        total += a[i] * b[i]
    return total
