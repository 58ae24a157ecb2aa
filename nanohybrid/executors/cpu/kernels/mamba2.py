"""Between Mamba-2's two projections, for one sequence and one group of heads: conv, SSD recurrence, gate, group norm.

A group needs nothing of another: its heads, its B and C, its part of the norm. So it is what threads share out.

The recurrence runs token by token, in a prompt as in a step of one token. That is no slower than chunks in matmul form, since a
head's state stays in the first level of the cache, and it makes a prompt's state the same bits however the prompt was cut.

    x, B, C = silu(conv);  dt = softplus(dt + bias);  S = exp(dt A) S + dt x B^T;  y = S C + D x;  out = norm(y silu(z))
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.executors.cpu.kernels.call import MAMBA, MAMBA_AT
from nanohybrid.ops.numba.jit import called, inlined
from nanohybrid.ops.numba.llvm import floats, halves
from nanohybrid.ops.numba.panels import inverse_rms, pack_columns, silu
from nanohybrid.ops.numba.scalars import narrow, widen
from nanohybrid.ops.numba.vectors import state_rows

TOKENS = 16  # of a sequence at a time: their x, B, C and y stay in the second level of the cache


@called
def convolve(fresh, values, pool, weight, bias, channels, first, count, window, out):
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
def gate(scanned, inputs, gates, skip, count):
    """y = (y + D x) silu(z), in place."""
    y, x, z = floats(scanned), floats(inputs), floats(gates)
    for p in range(count):
        y[p] = (y[p] + skip * x[p]) * silu(z[p])


@called
def run_group(
    start,
    count,
    position,
    group,
    projected,
    columns,
    sizes,
    at,
    limits,
    conv_pool,
    ssm_pool,
    room,
    packed,
    tile_rows,
    width,
):
    """Group `group` of one sequence: its `count` tokens, rows `start`... of the batch. `projected`: their rows of z | x B C | dt, `columns`
    wide; `room`: fp32 scratch; what comes out goes to the same rows of `packed`.

    A few tokens at a time, each head runs through all of them while its state is near. Where they are cut changes nothing.
    """
    heads, head_dim = sizes[MAMBA.heads], sizes[MAMBA.head_dim]
    groups, states = sizes[MAMBA.groups], sizes[MAMBA.state_size]
    mine = heads // groups * head_dim
    done = 0
    while done < count:
        here, row = min(TOKENS, count - done), start + done
        _some_tokens(
            here,
            position + done,
            group,
            projected + done * columns * 4,
            columns,
            sizes,
            at,
            limits,
            conv_pool,
            ssm_pool,
            room,
        )
        y = room + TOKENS * (mine + 2 * states) * 4
        for t in range(here):
            scale = inverse_rms(y + t * mine * 4, mine, limits[2])
            pack_columns(
                y + t * mine * 4,
                scale,
                at[MAMBA_AT.norm],
                mine,
                packed,
                row + t,
                group * mine,
                tile_rows,
                width,
            )
        done += here


@called
def _some_tokens(count, position, group, projected, columns, sizes, at, limits, conv_pool, ssm_pool, room):
    """At most TOKENS tokens of a group, up to y silu(z), which lies in `room` behind x, B and C."""
    heads, head_dim, groups = sizes[MAMBA.heads], sizes[MAMBA.head_dim], sizes[MAMBA.groups]
    states, window = sizes[MAMBA.state_size], sizes[MAMBA.conv_kernel]
    inner, each = heads * head_dim, heads // groups
    channels, mine = inner + 2 * groups * states, each * head_dim
    x, B = room, room + TOKENS * mine * 4
    C = B + TOKENS * states * 4
    y = C + TOKENS * states * 4
    for t in range(count):
        xBC, fresh = projected + (t * columns + inner) * 4, position + t == 0
        convolve(
            fresh,
            xBC,
            conv_pool,
            at[MAMBA_AT.taps],
            at[MAMBA_AT.conv_bias],
            channels,
            group * mine,
            mine,
            window,
            x + t * mine * 4,
        )
        convolve(
            fresh,
            xBC,
            conv_pool,
            at[MAMBA_AT.taps],
            at[MAMBA_AT.conv_bias],
            channels,
            inner + group * states,
            states,
            window,
            B + t * states * 4,
        )
        convolve(
            fresh,
            xBC,
            conv_pool,
            at[MAMBA_AT.taps],
            at[MAMBA_AT.conv_bias],
            channels,
            inner + (groups + group) * states,
            states,
            window,
            C + t * states * 4,
        )
    bias, rate, skip = floats(at[MAMBA_AT.dt_bias]), floats(at[MAMBA_AT.decay]), floats(at[MAMBA_AT.skip])
    for local in range(each):
        head = group * each + local
        state, place = ssm_pool + head * head_dim * states * 4, local * head_dim * 4
        for t in range(count):
            decay = np.float32(0)
            dt = floats(projected + (t * columns + inner + channels) * 4)[head] + bias[head]
            dt = dt if dt > np.float32(20) else np.float32(math.log1p(math.exp(dt)))
            dt = limits[0] if dt < limits[0] else (limits[1] if dt > limits[1] else dt)
            if position + t == 0:
                zero = floats(state)
                for i in range(head_dim * states):
                    zero[i] = np.float32(0)
            else:
                decay = np.float32(math.exp(dt * rate[head]))
            at_x, at_y = x + t * mine * 4 + place, y + t * mine * 4 + place
            state_rows(state, at_x, B + t * states * 4, C + t * states * 4, at_y, decay, dt, head_dim, states)
            gate(at_y, at_x, projected + (t * columns + group * mine) * 4 + place, skip[head], head_dim)


@inlined
def mamba_room(sizes):
    """fp32 numbers of scratch that `run_group` needs."""
    return TOKENS * (
        2 * (sizes[MAMBA.heads] // sizes[MAMBA.groups]) * sizes[MAMBA.head_dim] + 2 * sizes[MAMBA.state_size]
    )
