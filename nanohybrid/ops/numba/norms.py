"""RMSNorm within groups of channels, with or without Mamba-2's gate before it, and its gradient, row by row.

    u = x silu(z), or x;   n = u / sqrt(mean_group(u^2) + eps);   out = weight n
    dweight = sum_T dout n;   du = (g - n mean_group(g n)) / sqrt(...) with g = weight dout
    dx = du silu(z);   dz = du x silu'(z)

The backward pass recomputes all intermediate values from x and z. Rows are cut into tiles of a fixed height,
each with its own row of the weight's gradient, so the sum over tiles does not depend on the number of
threads. Sums are fp32.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inline, kernel
from nanohybrid.ops.numba.memory import (
    BF16_BYTES,
    F32_BYTES,
    as_f32,
    as_f64,
    as_i64,
    f32_at,
    i64_at,
    keep_alive,
)
from nanohybrid.ops.numba.rows import dot, fill_zeros, load_row, store_row
from nanohybrid.ops.numba.scalars import exp
from nanohybrid.ops.numba.threads import partition

TILE_ROWS = 64


@inline
def apply_gate(x, z, count, out):
    """u = x silu(z)."""
    value, gate, u = as_f32(x), as_f32(z), as_f32(out)
    one = np.float32(1)
    for i in range(count):
        u[i] = value[i] * gate[i] / (one + exp(-gate[i]))


@inline
def inverse_rms(u, count, eps):
    """1 / sqrt(mean(u^2) + eps)."""
    return np.float32(1.0 / math.sqrt(dot(u, u, count) / count + eps))


@inline
def unpack_args(call):
    """The arguments up to eps: rows, width, groups, x, x_stride, x_is_bf16, z, z_stride, weight, eps."""
    w = as_i64(call)
    return w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], as_f64(call)[9]


@kernel
def norm_forward(rank, size, control, call):
    """out [rows, width]; z is 0 without a gate. is_bf16: of z and out, x_is_bf16: of x; else fp32."""
    rows, width, groups, x, x_stride, x_is_bf16, z, z_stride, weight, eps = unpack_args(call)
    out, is_bf16 = as_i64(call)[10], as_i64(call)[11]
    part = width // groups
    scratch = np.empty(3 * part, dtype=np.float32)
    x_row = scratch.ctypes.data
    gate, u = f32_at(x_row, part), f32_at(x_row, 2 * part)
    x_bytes, out_bytes = BF16_BYTES if x_is_bf16 else F32_BYTES, BF16_BYTES if is_bf16 else F32_BYTES
    first, last = partition(rows, rank, size)
    for row in range(first, last):
        for group in range(groups):
            c = group * part
            load_row(x + (row * x_stride + c) * x_bytes, x_is_bf16, part, x_row, part)
            at = x_row
            if z:
                load_row(z + (row * z_stride + c) * out_bytes, is_bf16, part, gate, part)
                apply_gate(x_row, gate, part, u)
                at = u
            scale, gain, values = inverse_rms(at, part, eps), as_f32(f32_at(weight, c)), as_f32(at)
            for i in range(part):
                values[i] = values[i] * scale * gain[i]
            store_row(at, is_bf16, part, out + (row * width + c) * out_bytes)
    keep_alive(scratch)


@kernel
def norm_backward(rank, size, control, call):
    """dx and dz [rows, width] in the dtypes of x and z; dweight [tiles, width] in fp32."""
    rows, width, groups, x, x_stride, x_is_bf16, z, z_stride, weight, eps = unpack_args(call)
    more = as_i64(i64_at(call, 10))
    dout, dx, dz, is_bf16, dweight = more[0], more[1], more[2], more[3], more[4]
    part = width // groups
    scratch = np.empty(4 * part, dtype=np.float32)
    x_row = scratch.ctypes.data
    gate, u, grad = f32_at(x_row, part), f32_at(x_row, 2 * part), f32_at(x_row, 3 * part)
    x_bytes, out_bytes = BF16_BYTES if x_is_bf16 else F32_BYTES, BF16_BYTES if is_bf16 else F32_BYTES
    first, last = partition((rows + TILE_ROWS - 1) // TILE_ROWS, rank, size)
    for tile in range(first, last):
        fill_zeros(f32_at(dweight, tile * width), width)
        for row in range(tile * TILE_ROWS, min(rows, (tile + 1) * TILE_ROWS)):
            for group in range(groups):
                c = group * part
                load_row(x + (row * x_stride + c) * x_bytes, x_is_bf16, part, x_row, part)
                load_row(dout + (row * width + c) * out_bytes, is_bf16, part, grad, part)
                at = x_row
                if z:
                    load_row(z + (row * z_stride + c) * out_bytes, is_bf16, part, gate, part)
                    apply_gate(x_row, gate, part, u)
                    at = u
                scale, sums = inverse_rms(at, part, eps), f32_at(dweight, tile * width + c)
                norm_gradient(at, grad, f32_at(weight, c), part, scale, sums)
                if z:
                    gate_gradient(x_row, gate, grad, part)
                    store_row(gate, is_bf16, part, dz + (row * width + c) * out_bytes)
                store_row(grad, x_is_bf16, part, dx + (row * width + c) * x_bytes)
    keep_alive(scratch)


@inline
def norm_gradient(u, grad, weight, count, scale, dweight):
    """grad: dout on entry, du on return. Adds this row's part of the weight's gradient to dweight."""
    values, d, gain, sums = as_f32(u), as_f32(grad), as_f32(weight), as_f32(dweight)
    mean = np.float32(0)
    for i in range(count):
        n = values[i] * scale
        sums[i] += d[i] * n
        d[i] *= gain[i]
        mean += d[i] * n
    mean = np.float32(mean / np.float32(count)) * scale * scale
    for i in range(count):
        d[i] = d[i] * scale - values[i] * mean


@inline
def gate_gradient(x, z, grad, count):
    """grad: du on entry, dx on return. z: z on entry, dz on return."""
    value, gate, d = as_f32(x), as_f32(z), as_f32(grad)
    one = np.float32(1)
    for i in range(count):
        sigmoid = one / (one + exp(-gate[i]))
        du = d[i]
        d[i] = du * gate[i] * sigmoid
        gate[i] = du * value[i] * sigmoid * (one + gate[i] * (one - sigmoid))
