"""Mamba-2 between its projections, for one sequence and one group of heads: conv, SSD, gate, group norm.

A group needs nothing of another: it has its own heads, B and C, and its own part of the norm. So threads
partition the groups.

The recurrence runs token by token, for prompts as for decode steps. That is no slower than the chunked form,
since a head's state stays in the L1 cache, and a prompt's state has the same bits however the prompt was cut
into calls.

    x, B, C = silu(conv);  dt = softplus(dt + bias)
    S = exp(dt A) S + dt x B^T;  y = S C + D x;  out = norm(y silu(z))
"""

from __future__ import annotations

import math

import numpy as np

from nanohybrid.executors.cpu.kernels.call import MAMBA, MAMBA_MEMORY
from nanohybrid.ops.numba.jit import inline, noinline
from nanohybrid.ops.numba.memory import as_bf16, as_f32, f32_at
from nanohybrid.ops.numba.panels import inverse_rms, pack_scaled, silu
from nanohybrid.ops.numba.scalars import bf16_to_f32, f32_to_bf16
from nanohybrid.ops.numba.ssd_step_rows import update_state_rows

TOKENS = 16  # of a sequence, processed as a block: their x, B, C and y stay in the L2 cache


@noinline
def conv_silu_step(fresh, values, state, weight, bias, channels, first, count, window, out):
    """silu(causal conv) of one token for `count` channels from `first` on; advances the conv state.

    state: bfloat16 [window - 1, channels], read as zeros where `fresh`. The new input is rounded to bfloat16
    before it is used, as it is stored: it then counts the same in this token's output as in those of the next
    three.
    """
    new, stored, gain, offset, result = (
        as_f32(values),
        as_bf16(state),
        as_f32(weight),
        as_f32(bias),
        as_f32(out),
    )
    before, last = window - 1, (window - 1) * channels + first
    for i in range(count):
        result[i] = offset[first + i] + gain[last + i] * bf16_to_f32(f32_to_bf16(new[first + i]))
    for w in range(before):  # tap by tap, so that each pass vectorizes
        tap = w * channels + first
        if fresh:
            for i in range(count):
                stored[tap + i] = np.uint16(0)
        else:
            for i in range(count):
                result[i] += gain[tap + i] * bf16_to_f32(stored[tap + i])
    for w in range(before):
        tap = w * channels + first
        if w + 1 < before:
            for i in range(count):
                stored[tap + i] = stored[tap + channels + i]
        else:
            for i in range(count):
                stored[tap + i] = f32_to_bf16(new[first + i])
    for i in range(count):
        result[i] = silu(result[i])


@inline
def add_skip_and_gate(y, x, z, D, count):
    """y = (y + D x) silu(z), in place."""
    outputs, inputs, gates = as_f32(y), as_f32(x), as_f32(z)
    for p in range(count):
        outputs[p] = (outputs[p] + D * inputs[p]) * silu(gates[p])


@noinline
def run_group(
    start, count, position, group, projected, columns, sizes, memory, limits, conv_state, ssm_state, scratch,
    packed, tile_rows, width,
):  # fmt: skip
    """One group of one sequence: its `count` tokens, which are the rows of the batch from `start` on.

    projected: their rows of z | x B C | dt, `columns` wide. scratch: `mamba_scratch` fp32 numbers. The
    outputs go to the same rows of `packed`. Each head processes a block of tokens while its state is in the
    cache; where blocks end changes no bits.
    """
    heads, head_dim = sizes[MAMBA.heads], sizes[MAMBA.head_dim]
    groups, states = sizes[MAMBA.groups], sizes[MAMBA.state_size]
    channels = heads // groups * head_dim
    done = 0
    while done < count:
        block, row = min(TOKENS, count - done), start + done
        _run_block(
            block, position + done, group, f32_at(projected, done * columns), columns, sizes, memory, limits,
            conv_state, ssm_state, scratch,
        )  # fmt: skip
        y = f32_at(scratch, TOKENS * (channels + 2 * states))
        for t in range(block):
            at = f32_at(y, t * channels)
            scale, weight = inverse_rms(at, channels, limits[2]), memory[MAMBA_MEMORY.norm]
            pack_scaled(at, scale, weight, channels, packed, row + t, group * channels, tile_rows, width)
        done += block


@noinline
def _run_block(
    count, position, group, projected, columns, sizes, memory, limits, conv_state, ssm_state, scratch
):
    """At most TOKENS tokens of a group, up to y silu(z), which is left in `scratch` after x, B and C."""
    heads, head_dim, groups = sizes[MAMBA.heads], sizes[MAMBA.head_dim], sizes[MAMBA.groups]
    states, window = sizes[MAMBA.state_size], sizes[MAMBA.conv_kernel]
    inner, group_heads = heads * head_dim, heads // groups
    channels, group_channels = inner + 2 * groups * states, group_heads * head_dim
    x, B = scratch, f32_at(scratch, TOKENS * group_channels)
    C = f32_at(B, TOKENS * states)
    y = f32_at(C, TOKENS * states)
    weight, bias = memory[MAMBA_MEMORY.conv_weight], memory[MAMBA_MEMORY.conv_bias]
    first_x, first_B, first_C = (
        group * group_channels,
        inner + group * states,
        inner + (groups + group) * states,
    )
    for t in range(count):
        xBC, fresh = f32_at(projected, t * columns + inner), position + t == 0
        out_x, out_B, out_C = f32_at(x, t * group_channels), f32_at(B, t * states), f32_at(C, t * states)
        conv_silu_step(fresh, xBC, conv_state, weight, bias, channels, first_x, group_channels, window, out_x)
        conv_silu_step(fresh, xBC, conv_state, weight, bias, channels, first_B, states, window, out_B)
        conv_silu_step(fresh, xBC, conv_state, weight, bias, channels, first_C, states, window, out_C)
    dt_bias, A, D = (
        as_f32(memory[MAMBA_MEMORY.dt_bias]),
        as_f32(memory[MAMBA_MEMORY.A]),
        as_f32(memory[MAMBA_MEMORY.D]),
    )
    for local in range(group_heads):
        head = group * group_heads + local
        state = f32_at(ssm_state, head * head_dim * states)
        for t in range(count):
            decay = np.float32(0)
            dt = as_f32(f32_at(projected, t * columns + inner + channels))[head] + dt_bias[head]
            dt = dt if dt > np.float32(20) else np.float32(math.log1p(math.exp(dt)))
            dt = limits[0] if dt < limits[0] else (limits[1] if dt > limits[1] else dt)
            if position + t == 0:
                zero = as_f32(state)
                for i in range(head_dim * states):
                    zero[i] = np.float32(0)
            else:
                decay = np.float32(math.exp(dt * A[head]))
            at = t * group_channels + local * head_dim
            x_t, y_t, z_t = (
                f32_at(x, at),
                f32_at(y, at),
                f32_at(projected, t * columns + group * group_channels + local * head_dim),
            )
            B_t, C_t = f32_at(B, t * states), f32_at(C, t * states)
            update_state_rows(state, x_t, B_t, C_t, y_t, decay, dt, head_dim, states)
            add_skip_and_gate(y_t, x_t, z_t, D[head], head_dim)


@inline
def mamba_scratch(sizes):
    """fp32 numbers of scratch that `run_group` needs."""
    group_channels = (sizes[MAMBA.heads] // sizes[MAMBA.groups]) * sizes[MAMBA.head_dim]
    return TOKENS * (2 * group_channels + 2 * sizes[MAMBA.state_size])
