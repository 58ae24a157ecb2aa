"""A ragged batch of tokens through the whole model, in one kernel.

Weights are read once, however many tokens there are.

The model is a table of layers and a table of linears, and a call is a struct of words (call.py). Threads
partition the outputs of a linear, the groups of a Mamba-2 layer and the heads of an attention layer, with a
barrier where one needs what another has computed. The residual stream and all sums are fp32; activations
enter a linear as bfloat16.

Nothing that is computed for a token depends on the rest of the batch, or on how its sequence was cut into
calls: every sum has one order. So a chunked prompt, a cached prefix, a batch of one and a batch of sixty give
the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from nanohybrid.executors.cpu.kernels import profiler
from nanohybrid.executors.cpu.kernels.attention import attention_block, attention_scratch, num_blocks
from nanohybrid.executors.cpu.kernels.call import (
    ATTENTION,
    CALL,
    KERNELS,
    LAYER,
    LAYER_WORDS,
    MAMBA,
    MAMBA_MEMORY,
    MEMORY,
)
from nanohybrid.executors.cpu.kernels.gemm import (
    ADD,
    GATE,
    GROUPS,
    INPUTS,
    LINEAR,
    OUTPUTS,
    PAIRS,
    RELU2,
    REPLICATED_ROWS,
    STORE,
    TILE_SUMS,
    WIDTH,
    gemm,
    quantize_activations,
    tile_rows,
)
from nanohybrid.executors.cpu.kernels.kv_cache import write_kv
from nanohybrid.executors.cpu.kernels.mamba2 import mamba_scratch, run_group
from nanohybrid.executors.cpu.kernels.profiler import record
from nanohybrid.executors.cpu.kernels.quantize_rows import quantized_row_bytes
from nanohybrid.ops.numba.jit import inline, inline_ir, kernel
from nanohybrid.ops.numba.memory import (
    BF16_BYTES,
    F32_BYTES,
    I64_BYTES,
    as_bf16,
    as_f32,
    as_i64,
    bf16_at,
    f32_at,
)
from nanohybrid.ops.numba.panels import inverse_rms, norm_and_pack, pack_scaled, zero_padding
from nanohybrid.ops.numba.scalars import bf16_to_f32, f32_to_bf16
from nanohybrid.ops.numba.threads import barrier_wait, partition, pop_queue, reset_queue

MAMBA2_KERNEL, ATTENTION_KERNEL, GATED_MLP_KERNEL = map(KERNELS.index, ("mamba2", "attention", "gated_mlp"))


class Step(NamedTuple):
    """What every part of a forward reads: the thread, the batch, and scratch memory.

    Addresses as in call.Call.
    """

    rank: int
    size: int
    control: int
    profile: int  # this thread's counters, or 0
    rows: int
    height: int  # rows of a tile
    first: int  # this thread's rows: first to last
    last: int
    hidden: int
    residual: int
    projected: int
    normed: int  # of this thread where rows are replicated, else of all
    mixed: int
    own_quantized: int
    quantized: int
    sums: int  # of a tile
    scratch: int  # of a mixer


@inline
def _tables(call):
    """layers, linears, and the sizes and limits of all layers, as arrays."""
    w = as_i64(call)
    layers = numba.carray(as_i64(w[CALL.layers]), (w[CALL.layer_count], LAYER_WORDS))
    linears = numba.carray(as_i64(w[CALL.linears]), (w[CALL.linear_count], len(LINEAR)))
    mamba = numba.carray(as_i64(w[CALL.mamba]), (len(MAMBA),))
    attention = numba.carray(as_i64(w[CALL.attention]), (len(ATTENTION),))
    return layers, linears, mamba, attention, numba.carray(as_f32(w[CALL.limits]), (3,))


@inline_ir
def _linear(step, weight, x, epilogue, out, stride, other, other_width, steal):
    """Quantize the rows x where the weight needs it, and multiply. steal: threads steal units of work."""
    x = quantize_activations(
        weight, x, step.rows, step.rank, step.size, step.control, step.own_quantized, step.quantized
    )
    gemm(
        weight, x, step.rows, step.rank, step.size, step.control if steal else 0, step.sums, epilogue, out,
        stride, other, step.height if other else 0, other_width,
    )  # fmt: skip


@kernel
def forward(rank, size, control, call):
    """Final hidden states [T, E] in bfloat16, T up to MAX_ROWS, and logits of some rows.

    Updates states and pages in place.

    The words of `call` are those of call.Call. Sequence s has the rows starts[s] to starts[s + 1].
    """
    layers, linears, mamba, attention, limits = _tables(call)
    w = as_i64(call)
    rows, private = w[CALL.rows], w[CALL.private] + rank * w[CALL.private_bytes]
    profile = profiler.start(w[CALL.profile], rank)
    height, first_linear = tile_rows(rows), linears[0]
    first, last = partition(rows, rank, size)
    sums, own_quantized = private, f32_at(private, TILE_SUMS)
    normed, norm_first, norm_last, scratch = w[CALL.normed], first, last, own_quantized
    if rows <= REPLICATED_ROWS:
        padded, widest = (rows + height - 1) // height * height, 0
        for weight in linears:
            widest = max(widest, quantized_row_bytes(weight[GROUPS], weight[PAIRS]))
        normed, norm_first, norm_last = own_quantized + padded * widest, 0, rows
        scratch = bf16_at(normed, padded * first_linear[WIDTH])
    step = Step(
        rank, size, control, profile, rows, height, first, last, first_linear[INPUTS], w[CALL.residual],
        w[CALL.projected], normed, w[CALL.mixed], own_quantized, w[CALL.quantized], sums, scratch,
    )  # fmt: skip
    _embed(step, w[CALL.tokens], w[CALL.embeddings])
    barrier_wait(control, size)
    record(profile, profiler.WAKE)
    recurrent = 0
    for index in range(len(layers) - 1):
        layer = layers[index]
        at = layer[LAYER.first_linear]
        width = linears[at, WIDTH]
        norm_and_pack(
            step.residual,
            norm_first,
            norm_last,
            step.hidden,
            layer[LAYER.norm],
            limits[2],
            normed,
            height,
            width,
        )
        record(profile, profiler.NORMS)
        if rows > REPLICATED_ROWS:
            barrier_wait(control, size)
            record(profile, profiler.WAITING)
        if layer[LAYER.kernel] == MAMBA2_KERNEL:
            _mamba2(step, call, layer, linears[at], linears[at + 1], mamba, limits, recurrent)
            recurrent += 1
            at, phase = at + 1, profiler.MAMBA_OUT
        elif layer[LAYER.kernel] == ATTENTION_KERNEL:
            _attention(step, call, layer, linears, at, attention, limits)
            at, phase = at + 3, profiler.ATTENTION_OUT
        elif layer[LAYER.kernel] == GATED_MLP_KERNEL:
            _gated_mlp(step, linears[at], linears[at + 1], linears[at + 2])
            at, phase = at + 2, profiler.MLP_DOWN
        else:
            _mlp(step, linears[at], linears[at + 1])
            at, phase = at + 1, profiler.MLP_DOWN
        _add_to_residual(step, linears[at], phase)
    final_norm = layers[len(layers) - 1, LAYER.norm]
    _final_norm(step, final_norm, limits[2], w[CALL.out])
    if w[CALL.wanted_count]:
        _head(step, call, final_norm, limits[2])


@inline
def _embed(step, tokens, embeddings):
    """The embeddings of this thread's rows, into the residual stream."""
    ids, table, stream = as_i64(tokens), as_bf16(embeddings), as_f32(step.residual)
    for row in range(step.first, step.last):
        for i in range(step.hidden):
            stream[row * step.hidden + i] = bf16_to_f32(table[ids[row] * step.hidden + i])
    record(step.profile, profiler.EMBEDDING)


@inline_ir
def _mamba2(step, call, layer, in_proj, out_proj, sizes, limits, recurrent):
    """From the normed rows to the input of out_proj. recurrent: this layer's index among Mamba-2 layers."""
    w, columns = as_i64(call), in_proj[OUTPUTS]
    _linear(step, in_proj, step.normed, STORE, step.projected, columns, 0, 0, True)
    record(step.profile, profiler.MAMBA_IN)
    barrier_wait(step.control, step.size)
    record(step.profile, profiler.WAITING)
    if w[CALL.draft_inputs]:
        draft_rows = as_i64(w[CALL.draft_rows])
        for row in range(step.first, step.last):
            if draft_rows[row] >= 0:
                source = as_f32(f32_at(step.projected, row * columns))
                index = recurrent * w[CALL.draft_count] + draft_rows[row]
                saved = as_f32(f32_at(w[CALL.draft_inputs], index * columns))
                for i in range(columns):
                    saved[i] = source[i]
    starts, slots, positions = as_i64(w[CALL.starts]), as_i64(w[CALL.slots]), as_i64(w[CALL.positions])
    first, last = partition(w[CALL.sequences] * sizes[MAMBA.groups], step.rank, step.size)
    for item in range(first, last):
        sequence, group = item // sizes[MAMBA.groups], item % sizes[MAMBA.groups]
        start = starts[sequence]
        conv_state, ssm_state = _states(layer, sizes, slots[sequence])
        run_group(
            start, starts[sequence + 1] - start, positions[sequence], group, f32_at(step.projected, start *
            columns), columns, sizes, layer[MEMORY:], limits, conv_state, ssm_state, step.scratch, step.mixed,
            step.height, out_proj[WIDTH],
        )  # fmt: skip
    record(step.profile, profiler.RECURRENCE)


@inline
def _states(layer, sizes, slot):
    """The addresses of a slot's conv and SSM state."""
    inner, states = sizes[MAMBA.heads] * sizes[MAMBA.head_dim], sizes[MAMBA.state_size]
    channels = inner + 2 * sizes[MAMBA.groups] * states
    conv_state = bf16_at(layer[MEMORY + MAMBA_MEMORY.conv], slot * (sizes[MAMBA.conv_kernel] - 1) * channels)
    return conv_state, f32_at(layer[MEMORY + MAMBA_MEMORY.ssm], slot * inner * states)


@inline_ir
def _attention(step, call, layer, linears, at, sizes, limits):
    """From the normed rows to the input of o_proj: projections, writing of keys and values, attention."""
    kv_heads = sizes[ATTENTION.kv_heads]
    columns, offset = (sizes[ATTENTION.heads] + 2 * kv_heads) * sizes[ATTENTION.head_dim], 0
    for part in range(3):
        out = f32_at(step.projected, offset)
        _linear(step, linears[at + part], step.normed, STORE, out, columns, 0, 0, True)
        offset += linears[at + part, OUTPUTS]
    record(step.profile, profiler.QKV)
    barrier_wait(step.control, step.size)
    record(step.profile, profiler.WAITING)
    w, memory, width, eps = as_i64(call), layer[MEMORY:], linears[at + 3, WIDTH], limits[2]
    sequences, starts, positions = w[CALL.sequences], as_i64(w[CALL.starts]), as_i64(w[CALL.positions])
    pages, page_bytes, angles = w[CALL.pages], w[CALL.pages_per_sequence] * I64_BYTES, w[CALL.angles]
    first, last = partition(sequences * kv_heads, step.rank, step.size)
    for item in range(first, last):
        s, head = item // kv_heads, item % kv_heads
        write_kv(
            starts[s], starts[s + 1] - starts[s], positions[s], head, step.projected, columns, sizes, memory,
            eps, pages + s * page_bytes, angles,
        )  # fmt: skip
    if step.rank == 0:
        reset_queue(step.control)
    barrier_wait(step.control, step.size)
    s, before, item = 0, 0, pop_queue(step.control)
    while s < sequences:
        count = starts[s + 1] - starts[s]
        blocks = num_blocks(count, sizes)
        if item - before >= blocks * kv_heads:
            before += blocks * kv_heads
            s += 1
        else:  # blocks that see the most tokens come first
            block, head = blocks - 1 - (item - before) // kv_heads, (item - before) % kv_heads
            attention_block(
                block, starts[s], count, positions[s], head, step.projected, columns, sizes, memory, eps,
                pages + s * page_bytes, angles, step.scratch, step.mixed, step.height, width,
            )  # fmt: skip
            item = pop_queue(step.control)
    record(step.profile, profiler.ATTENTION)


@inline_ir
def _gated_mlp(step, gate, up, down):
    """silu(gate) * up, packed.

    Static partitions: each thread multiplies by the part of the gate that it computed itself.
    """
    columns = gate[OUTPUTS]
    _linear(step, gate, step.normed, STORE, step.projected, columns, 0, 0, False)
    _linear(step, up, step.normed, GATE, step.projected, columns, step.mixed, down[WIDTH], False)
    record(step.profile, profiler.MLP_UP)


@inline_ir
def _mlp(step, up, down):
    """relu(up)^2, packed."""
    _linear(step, up, step.normed, RELU2, 0, 0, step.mixed, down[WIDTH], True)
    record(step.profile, profiler.MLP_UP)


@inline_ir
def _add_to_residual(step, weight, phase):
    """The last linear of a layer, added to the residual stream."""
    if weight[INPUTS] < weight[WIDTH]:
        zero_padding(step.mixed, step.first, step.last, weight[INPUTS], step.height, weight[WIDTH])
    barrier_wait(step.control, step.size)
    record(step.profile, profiler.WAITING)
    _linear(step, weight, step.mixed, ADD, step.residual, step.hidden, 0, 0, True)
    record(step.profile, phase)
    barrier_wait(step.control, step.size)
    record(step.profile, profiler.WAITING)


@inline
def _final_norm(step, weight, eps, out):
    """The final norm of this thread's rows, in bfloat16."""
    stream, gain, result = as_f32(step.residual), as_f32(weight), as_bf16(out)
    for row in range(step.first, step.last):
        scale = inverse_rms(f32_at(step.residual, row * step.hidden), step.hidden, eps)
        for i in range(step.hidden):
            result[row * step.hidden + i] = f32_to_bf16(stream[row * step.hidden + i] * scale * gain[i])
    record(step.profile, profiler.FINAL_NORM)


@inline_ir
def _head(step, call, norm, eps):
    """Logits of the wanted rows."""
    w = as_i64(call)
    weight, wanted, count = as_i64(w[CALL.head]), as_i64(w[CALL.wanted_rows]), w[CALL.wanted_count]
    height, normed, hidden, scratch = tile_rows(count), w[CALL.normed], step.hidden, step.scratch
    first, last = partition(count, step.rank, step.size)
    if count <= REPLICATED_ROWS:
        row_bytes = quantized_row_bytes(weight[GROUPS], weight[PAIRS])
        normed = scratch + (count + height - 1) // height * height * row_bytes
        first, last = 0, count
    for i in range(first, last):
        at = f32_at(step.residual, wanted[i] * hidden)
        pack_scaled(at, inverse_rms(at, hidden, eps), norm, hidden, normed, i, 0, height, weight[WIDTH])
    if hidden < weight[WIDTH]:
        zero_padding(normed, first, last, hidden, height, weight[WIDTH])
    if count > REPLICATED_ROWS:
        barrier_wait(step.control, step.size)
    x = quantize_activations(
        weight, normed, count, step.rank, step.size, step.control, scratch, step.quantized
    )
    gemm(
        weight,
        x,
        count,
        step.rank,
        step.size,
        step.control,
        step.sums,
        STORE,
        w[CALL.logits],
        weight[OUTPUTS],
        0,
        0,
        0,
    )
    record(step.profile, profiler.HEAD)


@kernel
def advance(rank, size, control, call):
    """Advance conv and SSM states by accepted draft tokens: the first wanted_rows[s] tokens of sequence s.

    `forward` has saved their projections in draft_inputs, from row starts[s] on.
    """
    layers, linears, mamba, _, limits = _tables(call)
    w = as_i64(call)
    mixed, private = w[CALL.mixed], w[CALL.private] + rank * w[CALL.private_bytes]
    scratch = f32_at(private, TILE_SUMS)
    starts, slots, positions = as_i64(w[CALL.starts]), as_i64(w[CALL.slots]), as_i64(w[CALL.positions])
    draft_inputs, draft_count, counts = w[CALL.draft_inputs], w[CALL.draft_count], as_i64(w[CALL.wanted_rows])
    recurrent, groups = 0, mamba[MAMBA.groups]
    first, last = partition(w[CALL.sequences] * groups, rank, size)
    for index in range(len(layers) - 1):
        layer = layers[index]
        if layer[LAYER.kernel] == MAMBA2_KERNEL:
            at = layer[LAYER.first_linear]
            columns, width = linears[at, OUTPUTS], linears[at + 1, WIDTH]
            for item in range(first, last):
                s, group = item // groups, item % groups
                rows = f32_at(draft_inputs, (recurrent * draft_count + starts[s]) * columns)
                conv_state, ssm_state = _states(layer, mamba, slots[s])
                # The outputs are not needed. They go to the first rows of `mixed`, of which there are enough.
                run_group(
                    0, counts[s], positions[s], group, rows, columns, mamba, layer[MEMORY:], limits,
                    conv_state, ssm_state, scratch, mixed, 1, width,
                )  # fmt: skip
            recurrent += 1


def private_size(
    rows: int, width: int, quantized_bytes: int, mamba: np.ndarray, attention: np.ndarray
) -> int:
    """Bytes of scratch that each thread needs for a batch of `rows`.

    width: of the widest linear's input. quantized_bytes: of the longest quantized row.
    """
    mixer = max(
        mamba_scratch.py_func(mamba) if mamba[MAMBA.groups] else 0,
        attention_scratch.py_func(attention) if attention[ATTENTION.kv_heads] else 0,
    )
    replicated = (min(rows, REPLICATED_ROWS) + 12) * (width * BF16_BYTES + quantized_bytes)
    return int(-(-(replicated + (TILE_SUMS + mixer) * F32_BYTES) // 64) * 64)
