"""Packed rows of activations, as the GEMM tiles read them: packing, RMSNorm, SiLU.

Packed rows are tiles of R rows; a tile is [K/2][R][2] bfloat16. K is padded with zeros to `width`, a whole
number of groups. Arguments are addresses (int64), sizes, and strides in elements.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inline
from nanohybrid.ops.numba.memory import as_bf16, as_f32, f32_at
from nanohybrid.ops.numba.scalars import exp, f32_to_bf16


@inline
def packed_index(row, k, tile_rows, width):
    """The index of element k of a row among packed rows."""
    return (row // tile_rows) * tile_rows * width + (k // 2) * tile_rows * 2 + (row % tile_rows) * 2 + k % 2


@inline
def zero_padding(packed, first, last, size, tile_rows, width):
    """Zero the padding of K from `size` on: multiplied by the weights' zeros, a NaN would stay NaN."""
    out = as_bf16(packed)
    for row in range(first, last):
        for k in range(size, width):
            out[packed_index(row, k, tile_rows, width)] = np.uint16(0)


@inline
def pack_scaled(values, scale, weight, count, packed, row, first, tile_rows, width):
    """Pack bfloat16(values * scale * weight[first...]) as the row's `count` columns from `first` on."""
    source, gain, out = as_f32(values), as_f32(f32_at(weight, first)), as_bf16(packed)
    at, step = packed_index(row, first, tile_rows, width), 2 * tile_rows
    i = 0
    if first % 2 and count:
        out[at] = f32_to_bf16(source[0] * scale * gain[0])
        at, i = at + step - 1, 1
    while i + 1 < count:
        out[at] = f32_to_bf16(source[i] * scale * gain[i])
        out[at + 1] = f32_to_bf16(source[i + 1] * scale * gain[i + 1])
        at, i = at + step, i + 2
    if i < count:
        out[at] = f32_to_bf16(source[i] * scale * gain[i])


@inline
def inverse_rms(values, size, eps):
    """1 / sqrt(mean(values^2) + eps)."""
    source = as_f32(values)
    total = np.float32(0)
    for i in range(size):
        total += source[i] * source[i]
    return np.float32(1.0 / math.sqrt(total / size + eps))


@inline
def pack_values(values, count, packed, row, first, tile_rows, width):
    """Pack bfloat16(values) as the row's `count` columns from `first` on, which must be even."""
    source, out = as_f32(values), as_bf16(packed)
    at, step = packed_index(row, first, tile_rows, width), 2 * tile_rows
    for pair in range(count // 2):
        out[at] = f32_to_bf16(source[2 * pair])
        out[at + 1] = f32_to_bf16(source[2 * pair + 1])
        at += step
    if count % 2:
        out[at] = f32_to_bf16(source[count - 1])


@inline
def norm_and_pack(values, first, last, size, weight, eps, packed, tile_rows, width):
    """RMSNorm of the fp32 rows `first` to `last`, packed, with zeros in the padding of K."""
    for row in range(first, last):
        at = f32_at(values, row * size)
        pack_scaled(at, inverse_rms(at, size, eps), weight, size, packed, row, 0, tile_rows, width)
    if size < width:
        zero_padding(packed, first, last, size, tile_rows, width)


@inline
def pack_bf16_tiles(values, stride, first, last, total, size, packed, tile_rows, width):
    """Pack the tiles `first` to `last` of bfloat16 rows, with zeros beyond `total` rows and `size`
    columns.
    """
    bits, out = as_bf16(values), as_bf16(packed)
    for tile in range(first, last):
        at = tile * tile_rows * width
        for pair in range(width // 2):
            for row in range(tile_rows):
                index = tile * tile_rows + row
                source = index * stride + 2 * pair
                out[at] = bits[source] if index < total and 2 * pair < size else np.uint16(0)
                out[at + 1] = bits[source + 1] if index < total and 2 * pair + 1 < size else np.uint16(0)
                at += 2


@inline
def silu(x):
    """x / (1 + e^-x)."""
    return x / (np.float32(1) + exp(-x))
