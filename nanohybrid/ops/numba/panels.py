"""Rows of activations: packing for tile.py, RMSNorm, and what is made of a tile's sums.

Packed rows are tiles of R rows, within a tile [K/2][R][2] bfloat16; K is padded with zeros to `width`, a whole number of groups.
Arguments are addresses (int64), sizes, and strides in elements.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inlined
from nanohybrid.ops.numba.llvm import floats, halves
from nanohybrid.ops.numba.scalars import exp, narrow


@inlined
def place(row, k, tile_rows, width):
    """Where element k of a row stands among packed rows."""
    return (row // tile_rows) * tile_rows * width + (k // 2) * tile_rows * 2 + (row % tile_rows) * 2 + k % 2


@inlined
def clear_padding(packed, first, last, size, tile_rows, width):
    """Zeros where K of these rows beyond `size` is padding: the weights' zeros do not help against what is no number."""
    out = halves(packed)
    for row in range(first, last):
        for k in range(size, width):
            out[place(row, k, tile_rows, width)] = np.uint16(0)


@inlined
def pack_columns(values, scale, weight, count, packed, row, first, tile_rows, width):
    """bfloat16(values * scale * weight[first...]), `count` fp32 values of one row, packed as its columns from `first` on."""
    source, gain, out = floats(values), floats(weight + first * 4), halves(packed)
    at, step = place(row, first, tile_rows, width), 2 * tile_rows
    i = 0
    if first % 2 and count:
        out[at] = narrow(source[0] * scale * gain[0])
        at, i = at + step - 1, 1
    while i + 1 < count:
        out[at] = narrow(source[i] * scale * gain[i])
        out[at + 1] = narrow(source[i + 1] * scale * gain[i + 1])
        at, i = at + step, i + 2
    if i < count:
        out[at] = narrow(source[i] * scale * gain[i])


@inlined
def inverse_rms(values, size, eps):
    """1 / sqrt(mean of squares + eps)."""
    source = floats(values)
    total = np.float32(0)
    for i in range(size):
        total += source[i] * source[i]
    return np.float32(1.0 / math.sqrt(total / size + eps))


@inlined
def pack_values(values, count, packed, row, first, tile_rows, width):
    """bfloat16 of `count` fp32 values of one row, packed as its columns from `first` on, an even one."""
    source, out = floats(values), halves(packed)
    at, step = place(row, first, tile_rows, width), 2 * tile_rows
    for pair in range(count // 2):
        out[at] = narrow(source[2 * pair])
        out[at + 1] = narrow(source[2 * pair + 1])
        at += step
    if count % 2:
        out[at] = narrow(source[count - 1])


@inlined
def norm_and_pack(values, first, last, size, weight, eps, packed, tile_rows, width):
    """RMSNorm of the fp32 rows `first` to `last`, packed, zeros in the padding of K."""
    for row in range(first, last):
        at = values + row * size * 4
        pack_columns(at, inverse_rms(at, size, eps), weight, size, packed, row, 0, tile_rows, width)
    if size < width:
        clear_padding(packed, first, last, size, tile_rows, width)


@inlined
def pack_halves(values, stride, first, last, total, size, packed, tile_rows, width):
    """Tiles `first` to `last` of bfloat16 rows, as they are; rows beyond `total` and the padding of K become zeros."""
    words, out = halves(values), halves(packed)
    for tile in range(first, last):
        at = tile * tile_rows * width
        for pair in range(width // 2):
            for row in range(tile_rows):
                index = tile * tile_rows + row
                source = index * stride + 2 * pair
                out[at] = words[source] if index < total and 2 * pair < size else np.uint16(0)
                out[at + 1] = words[source + 1] if index < total and 2 * pair + 1 < size else np.uint16(0)
                at += 2


@inlined
def silu(x):
    return x / (np.float32(1) + exp(-x))
