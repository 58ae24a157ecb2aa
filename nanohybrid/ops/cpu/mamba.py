"""Between Mamba-2's two projections, for one token of one sequence and one group of heads: conv, SSD step, gate, group norm.

A group needs nothing of another: its heads, its B and C, its part of the norm. So it is what threads share out.

    x, B, C = silu(conv);  dt = softplus(dt + bias);  S = exp(dt A) S + dt x B^T;  y = S C + D x;  out = norm(y silu(z))
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.ops.cpu.compiled import inlined
from nanohybrid.ops.cpu.llvm import floats, halves
from nanohybrid.ops.cpu.rows import inverse_rms, pack_columns, silu
from nanohybrid.ops.cpu.scalars import narrow, widen
from nanohybrid.ops.cpu.vectors import state_rows


@inlined
def convolve(fresh, values, pool, weight, bias, channels, first, count, window, out):  # type: ignore[no-untyped-def]
    """silu(causal conv) of `count` channels from `first` on, into fp32 `out`; `pool` ([window - 1, channels]) moves on by one.

    The input enters as bfloat16, as it is stored: a token then counts the same now and in the three steps after.
    """
    new, kept, gain, offset, result = floats(values), halves(pool), floats(weight), floats(bias), floats(out)
    before, last = window - 1, (window - 1) * channels + first
    for i in range(count):
        result[i] = offset[first + i] + gain[last + i] * widen(narrow(new[first + i]))
    for w in range(before):  # tap by tap, so that each pass is a loop of vectors
        tap = w * channels + first
        if fresh:
            for i in range(count):
                kept[tap + i] = np.uint16(0)
        else:
            for i in range(count):
                result[i] += gain[tap + i] * widen(kept[tap + i])
    for w in range(before):
        tap = w * channels + first
        if w + 1 < before:
            for i in range(count):
                kept[tap + i] = kept[tap + channels + i]
        else:
            for i in range(count):
                kept[tap + i] = narrow(new[first + i])
    for i in range(count):
        result[i] = silu(result[i])


@inlined
def gate(scanned, inputs, gates, skip, count):  # type: ignore[no-untyped-def]
    """y = (y + D x) silu(z), in place."""
    y, x, z = floats(scanned), floats(inputs), floats(gates)
    for p in range(count):
        y[p] = (y[p] + skip * x[p]) * silu(z[p])


@inlined
def step_group(fresh, row, group, projected, sizes, at, limits, conv_pool, ssm_pool, room, packed, tile_rows, width):  # type: ignore[no-untyped-def]
    """Group `group` of one sequence. `projected`: its row of z | x B C | dt; `room`: fp32 scratch; out goes to `packed`."""
    heads, head_dim, groups, states, window = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    inner, each = heads * head_dim, heads // groups
    channels, mine = inner + 2 * groups * states, each * head_dim
    xBC = projected + inner * 4
    x, B, C, y = room, room + mine * 4, room + (mine + states) * 4, room + (mine + 2 * states) * 4
    convolve(fresh, xBC, conv_pool, at[2], at[3], channels, group * mine, mine, window, x)
    convolve(fresh, xBC, conv_pool, at[2], at[3], channels, inner + group * states, states, window, B)
    convolve(fresh, xBC, conv_pool, at[2], at[3], channels, inner + (groups + group) * states, states, window, C)
    steps, bias, rate, skip = floats(projected + (inner + channels) * 4), floats(at[4]), floats(at[5]), floats(at[6])
    for local in range(each):
        head = group * each + local
        dt = steps[head] + bias[head]
        dt = dt if dt > np.float32(20) else np.float32(math.log1p(math.exp(dt)))
        dt = limits[0] if dt < limits[0] else (limits[1] if dt > limits[1] else dt)
        decay = np.float32(0) if fresh else np.float32(math.exp(dt * rate[head]))
        state = ssm_pool + head * head_dim * states * 4
        if fresh:
            zero = floats(state)
            for i in range(head_dim * states):
                zero[i] = np.float32(0)
        state_rows(state, x + local * head_dim * 4, B, C, y + local * head_dim * 4, decay, dt, head_dim, states)
        gate(y + local * head_dim * 4, x + local * head_dim * 4, projected + (group * mine + local * head_dim) * 4, skip[head], head_dim)
    pack_columns(y, inverse_rms(y, mine, limits[2]), at[7], mine, packed, row, group * mine, tile_rows, width)


@inlined
def mamba_room(sizes):  # type: ignore[no-untyped-def]
    """fp32 numbers of scratch that `step_group` needs."""
    return 2 * (sizes[0] // sizes[2]) * sizes[1] + 2 * sizes[3]
