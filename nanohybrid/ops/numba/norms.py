"""RMSNorm within groups of channels, with Mamba-2's gate before it or without, and its gradient, a row at a time.

    u = x silu(z), or x;   n = u / sqrt(mean_group(u^2) + eps);   out = weight n
    dweight = sum_T dout n;   du = (g - n mean_group(g n)) / sqrt(...) with g = weight dout;   dx = du silu(z);   dz = du x silu'(z)

Everything between is made again from x and z. Rows are cut into tiles of a fixed height, each with its own row of the weight's
gradient: their sum does not depend on how many threads there are. Sums are fp32.
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import doubles, floats, hold, words
from nanohybrid.ops.numba.rows import clear, dot, load_row, store_row
from nanohybrid.ops.numba.scalars import exp
from nanohybrid.ops.numba.threads import share

TILE = 64  # rows


@inlined
def gated(x, z, count, out):
    """u = x silu(z)."""
    value, gate, u = floats(x), floats(z), floats(out)
    one = np.float32(1)
    for i in range(count):
        u[i] = value[i] * gate[i] / (one + exp(-gate[i]))


@inlined
def inverse(u, count, eps):
    """1 / sqrt(mean of squares + eps)."""
    return np.float32(1.0 / math.sqrt(dot(u, u, count) / count + eps))


@inlined
def given(call):
    """What both kernels are told first."""
    w = words(call)
    return w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], doubles(call)[9]


@kernel
def norm_forward(rank, size, barrier, call):
    """out [rows, width]; z is 0 where there is no gate; z and out in bfloat16 where `half`, x where `half_x`."""
    rows, width, groups, x, x_stride, half_x, z, z_stride, weight, eps = given(call)
    out, half = words(call)[10], words(call)[11]
    part = width // groups
    room = np.empty(3 * part, dtype=np.float32)
    here = room.ctypes.data
    gate, u = here + part * 4, here + 2 * part * 4
    bytes_x, bytes_out = 2 if half_x else 4, 2 if half else 4
    first, last = share(rows, rank, size)
    for row in range(first, last):
        for group in range(groups):
            c = group * part
            load_row(x + (row * x_stride + c) * bytes_x, half_x, part, here, part)
            at = here
            if z:
                load_row(z + (row * z_stride + c) * bytes_out, half, part, gate, part)
                gated(here, gate, part, u)
                at = u
            scale, gain, values = inverse(at, part, eps), floats(weight + c * 4), floats(at)
            for i in range(part):
                values[i] = values[i] * scale * gain[i]
            store_row(at, half, part, out + (row * width + c) * bytes_out)
    hold(room)


@kernel
def norm_backward(rank, size, barrier, call):
    """dx and dz [rows, width] in the dtypes of x and z, dweight [tiles, width] in fp32."""
    rows, width, groups, x, x_stride, half_x, z, z_stride, weight, eps = given(call)
    more = words(call + 10 * 8)
    dout, dx, dz, half, dweight = more[0], more[1], more[2], more[3], more[4]
    part = width // groups
    room = np.empty(4 * part, dtype=np.float32)
    here = room.ctypes.data
    gate, u, slope = here + part * 4, here + 2 * part * 4, here + 3 * part * 4
    bytes_x, bytes_out = 2 if half_x else 4, 2 if half else 4
    first, last = share((rows + TILE - 1) // TILE, rank, size)
    for tile in range(first, last):
        clear(dweight + tile * width * 4, width)
        for row in range(tile * TILE, min(rows, (tile + 1) * TILE)):
            for group in range(groups):
                c = group * part
                load_row(x + (row * x_stride + c) * bytes_x, half_x, part, here, part)
                load_row(dout + (row * width + c) * bytes_out, half, part, slope, part)
                at = here
                if z:
                    load_row(z + (row * z_stride + c) * bytes_out, half, part, gate, part)
                    gated(here, gate, part, u)
                    at = u
                through_norm(
                    at, slope, weight + c * 4, part, inverse(at, part, eps), dweight + (tile * width + c) * 4
                )
                if z:
                    through_gate(here, gate, slope, part)
                    store_row(gate, half, part, dz + (row * width + c) * bytes_out)
                store_row(slope, half_x, part, dx + (row * width + c) * bytes_x)
    hold(room)


@inlined
def through_norm(u, slope, weight, count, scale, dweight):
    """slope: dout, and then du; its share of dweight is added."""
    values, d, gain, sums = floats(u), floats(slope), floats(weight), floats(dweight)
    shared = np.float32(0)
    for i in range(count):
        n = values[i] * scale
        sums[i] += d[i] * n
        d[i] *= gain[i]
        shared += d[i] * n
    shared = np.float32(shared / np.float32(count)) * scale * scale
    for i in range(count):
        d[i] = d[i] * scale - values[i] * shared


@inlined
def through_gate(x, z, slope, count):
    """slope: du, and then dx; z: then dz."""
    value, gate, d = floats(x), floats(z), floats(slope)
    one = np.float32(1)
    for i in range(count):
        open_ = one / (one + exp(-gate[i]))
        du = d[i]
        d[i] = du * gate[i] * open_
        gate[i] = du * value[i] * open_ * (one + gate[i] * (one - open_))
