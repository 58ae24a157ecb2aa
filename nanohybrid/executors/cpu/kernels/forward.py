"""A ragged batch of tokens through the whole model, in one kernel: weights pass by once, however many tokens there are.

The model is a table of layers and a table of linears, and a call is a struct of words (call.py). Threads share the outputs of a linear, the
groups of a Mamba-2 layer, the heads of an attention layer, and meet where one needs what another made. The residual stream and
all sums are fp32; activations enter a linear as bfloat16.

Nothing that is computed for a token depends on what shares the batch, nor on how its sequence was cut into calls: every sum has
one order. So a prompt in pieces, a cached beginning, a batch of one or of sixty give the same bits.
"""

from __future__ import annotations

import numba
import numpy as np

from nanohybrid.executors.cpu.kernels import profiler as laps
from nanohybrid.executors.cpu.kernels.attention import attend, attention_room, blocks_of
from nanohybrid.executors.cpu.kernels.call import (
    AT,
    ATTENTION,
    CALL,
    KERNELS,
    LAYER,
    MAMBA,
    MAMBA_AT,
    ROW,
)
from nanohybrid.executors.cpu.kernels.gemm import (
    ADD,
    FEW,
    GATE,
    GROUPS,
    INPUTS,
    LINEAR,
    OUTPUTS,
    PAIRS,
    RELU2,
    STORE,
    SUMS,
    WIDTH,
    multiply,
    suited,
    tile_rows,
)
from nanohybrid.executors.cpu.kernels.gemm_int8 import row_bytes
from nanohybrid.executors.cpu.kernels.kv_cache import remember
from nanohybrid.executors.cpu.kernels.mamba2 import mamba_room, run_group
from nanohybrid.executors.cpu.kernels.profiler import lap
from nanohybrid.ops.numba.jit import inlined, kernel
from nanohybrid.ops.numba.llvm import floats, halves, words
from nanohybrid.ops.numba.panels import clear_padding, inverse_rms, norm_and_pack, pack_columns
from nanohybrid.ops.numba.scalars import narrow, widen
from nanohybrid.ops.numba.threads import deal_anew, meet, share, take

MAMBA2_KERNEL, ATTENTION_KERNEL, GATED_MLP_KERNEL = map(KERNELS.index, ("mamba2", "attention", "gated_mlp"))


@inlined
def _tables(call):
    """layers, linears, and the numbers that are the same for all of them."""
    w = words(call)
    layers = numba.carray(words(w[CALL.layers]), (w[CALL.layer_count], ROW))
    linears = numba.carray(words(w[CALL.linears]), (w[CALL.linear_count], len(LINEAR)))
    mamba = numba.carray(words(w[CALL.mamba]), (len(MAMBA),))
    attention = numba.carray(words(w[CALL.attention]), (len(ATTENTION),))
    return layers, linears, mamba, attention, numba.carray(floats(w[CALL.limits]), (3,))


@inlined
def _groups(
    layer,
    sequences,
    starts,
    slots,
    positions,
    projected,
    columns,
    sizes,
    limits,
    room,
    packed,
    height,
    width,
    rank,
    size,
):
    """The groups of all sequences, shared out."""
    heads, head_dim, groups = sizes[MAMBA.heads], sizes[MAMBA.head_dim], sizes[MAMBA.groups]
    states, window = sizes[MAMBA.state_size], sizes[MAMBA.conv_kernel]
    channels = heads * head_dim + 2 * groups * states
    first, last = share(sequences * groups, rank, size)
    for item in range(first, last):
        sequence, group = item // groups, item % groups
        start, slot = starts[sequence], slots[sequence]
        conv = layer[AT + MAMBA_AT.conv] + slot * (window - 1) * channels * 2
        ssm = layer[AT + MAMBA_AT.ssm] + slot * heads * head_dim * states * 4
        run_group(
            start, starts[sequence + 1] - start, positions[sequence], group, projected + start * columns * 4, columns,
            sizes, layer[AT:], limits, conv, ssm, room, packed, height, width,
        )  # fmt: skip


@inlined
def _heads(
    layer, barrier, sequences, starts, positions, pages, page_bytes, projected, columns, sizes, limits, angles, room, packed, height, width,
    rank, size,
):  # fmt: skip
    """Keys and values of all sequences into their pages; then the queries, block by block, whoever is free."""
    at, kv_heads = layer[AT:], sizes[ATTENTION.kv_heads]
    first, last = share(sequences * kv_heads, rank, size)
    for item in range(first, last):
        s, head = item // kv_heads, item % kv_heads
        table, count = pages + s * page_bytes, starts[s + 1] - starts[s]
        remember(
            starts[s], count, positions[s], head, projected, columns, sizes, at, limits[2], table, angles
        )
    if rank == 0:
        deal_anew(barrier)
    meet(barrier, size)
    s, before, item = 0, 0, take(barrier)
    while s < sequences:
        count = starts[s + 1] - starts[s]
        blocks = blocks_of(count, sizes)
        if item - before >= blocks * kv_heads:
            before += blocks * kv_heads
            s += 1
        else:
            block, head = (
                blocks - 1 - (item - before) // kv_heads,
                (item - before) % kv_heads,
            )  # those that see most come first
            attend(
                block, starts[s], count, positions[s], head, projected, columns, sizes, at, limits[2],
                pages + s * page_bytes, angles, room, packed, height, width,
            )  # fmt: skip
            item = take(barrier)


@kernel
def forward(rank, size, barrier, call):
    """Final hidden states [T, E] in bfloat16, T up to ROWS_AT_ONCE, and logits of some rows; states and pages are brought up to date
    in place.

    The words of `call` are those of call.Call. Sequence s has the rows starts[s] to starts[s + 1].
    """
    layers, linears, mamba, attention, limits = _tables(call)
    w = words(call)
    embeddings, head = w[CALL.embeddings], w[CALL.head]
    residual, projected, normed, fixed = (
        w[CALL.residual],
        w[CALL.projected],
        w[CALL.normed],
        w[CALL.quantized_rows],
    )
    shared, private = w[CALL.shared], w[CALL.private] + rank * w[CALL.private_bytes]
    tokens, rows, sequences = words(w[CALL.tokens]), w[CALL.rows], w[CALL.sequences]
    starts, slots, positions = words(w[CALL.starts]), words(w[CALL.slots]), words(w[CALL.positions])
    pages, page_bytes, angles = w[CALL.pages], w[CALL.pages_per_sequence] * 8, w[CALL.angles]
    kept, kept_rows, kept_count = w[CALL.draft_inputs], words(w[CALL.draft_rows]), w[CALL.draft_count]
    out, logits, chosen, count = w[CALL.out], w[CALL.logits], words(w[CALL.wanted_rows]), w[CALL.wanted_count]
    clock = w[CALL.clock]
    watch = laps.start(clock, rank)
    hidden, height, sums = linears[0, INPUTS], tile_rows(rows), private
    room = sums + SUMS * 4
    mine, own = normed, room
    first, last = share(rows, rank, size)
    norm_first, norm_last = first, last
    if rows <= FEW:
        padded, widest = (rows + height - 1) // height * height, 0
        for weight in linears:
            widest = max(widest, row_bytes(weight[GROUPS], weight[PAIRS]))
        mine, norm_first, norm_last = room + padded * widest, 0, rows
        room = mine + padded * linears[0, WIDTH] * 2
    table, stream = halves(embeddings), floats(residual)
    for row in range(first, last):
        for i in range(hidden):
            stream[row * hidden + i] = widen(table[tokens[row] * hidden + i])
    lap(watch, laps.EMBEDDING)
    meet(barrier, size)
    lap(watch, laps.WAKE)
    mambas = 0
    for index in range(len(layers) - 1):
        layer = layers[index]
        at = layer[LAYER.first_linear]
        norm_and_pack(
            residual,
            norm_first,
            norm_last,
            hidden,
            layer[LAYER.norm],
            limits[2],
            mine,
            height,
            linears[at, WIDTH],
        )
        lap(watch, laps.NORMS)
        if rows > FEW:
            meet(barrier, size)
            lap(watch, laps.WAITING)
        if layer[LAYER.kernel] == MAMBA2_KERNEL:
            columns, width = linears[at, OUTPUTS], linears[at + 1, WIDTH]
            x = suited(linears[at], mine, rows, rank, size, barrier, own, fixed)
            multiply(linears[at], x, rows, rank, size, barrier, sums, STORE, projected, columns, 0, 0, 0)
            lap(watch, laps.MAMBA_IN)
            meet(barrier, size)
            lap(watch, laps.WAITING)
            if kept:
                for row in range(first, last):
                    if kept_rows[row] >= 0:
                        source = floats(projected + row * columns * 4)
                        copy = floats(kept + (mambas * kept_count + kept_rows[row]) * columns * 4)
                        for i in range(columns):
                            copy[i] = source[i]
            _groups(
                layer,
                sequences,
                starts,
                slots,
                positions,
                projected,
                columns,
                mamba,
                limits,
                room,
                shared,
                height,
                width,
                rank,
                size,
            )
            lap(watch, laps.RECURRENCE)
            mambas += 1
            back, last_phase = at + 1, laps.MAMBA_OUT
        elif layer[LAYER.kernel] == ATTENTION_KERNEL:
            columns, offset, width = (
                (attention[ATTENTION.heads] + 2 * attention[ATTENTION.kv_heads])
                * attention[ATTENTION.head_dim],
                0,
                linears[at + 3, WIDTH],
            )
            for part in range(3):
                x = suited(linears[at + part], mine, rows, rank, size, barrier, own, fixed)
                multiply(
                    linears[at + part],
                    x,
                    rows,
                    rank,
                    size,
                    barrier,
                    sums,
                    STORE,
                    projected + offset * 4,
                    columns,
                    0,
                    0,
                    0,
                )
                offset += linears[at + part, OUTPUTS]
            lap(watch, laps.QKV)
            meet(barrier, size)
            lap(watch, laps.WAITING)
            _heads(
                layer, barrier, sequences, starts, positions, pages, page_bytes, projected, columns, attention, limits, angles, room,
                shared, height, width, rank, size,
            )  # fmt: skip
            lap(watch, laps.ATTENTION)
            back, last_phase = at + 3, laps.ATTENTION_OUT
        elif layer[LAYER.kernel] == GATED_MLP_KERNEL:
            columns, width = linears[at, OUTPUTS], linears[at + 2, WIDTH]
            # each thread multiplies by the gate that it made itself
            x = suited(linears[at], mine, rows, rank, size, barrier, own, fixed)
            multiply(linears[at], x, rows, rank, size, 0, sums, STORE, projected, columns, 0, 0, 0)
            x = suited(linears[at + 1], mine, rows, rank, size, barrier, own, fixed)
            multiply(
                linears[at + 1], x, rows, rank, size, 0, sums, GATE, projected, columns, shared, height, width
            )
            lap(watch, laps.UP)
            back, last_phase = at + 2, laps.DOWN
        else:
            x = suited(linears[at], mine, rows, rank, size, barrier, own, fixed)
            multiply(
                linears[at],
                x,
                rows,
                rank,
                size,
                barrier,
                sums,
                RELU2,
                0,
                0,
                shared,
                height,
                linears[at + 1, WIDTH],
            )
            lap(watch, laps.UP)
            back, last_phase = at + 1, laps.DOWN
        if linears[back, INPUTS] < linears[back, WIDTH]:
            clear_padding(shared, first, last, linears[back, INPUTS], height, linears[back, WIDTH])
        meet(barrier, size)
        lap(watch, laps.WAITING)
        x = suited(linears[back], shared, rows, rank, size, barrier, own, fixed)
        multiply(linears[back], x, rows, rank, size, barrier, sums, ADD, residual, hidden, 0, 0, 0)
        lap(watch, last_phase)
        meet(barrier, size)
        lap(watch, laps.WAITING)
    last_norm = layers[len(layers) - 1, LAYER.norm]
    gain, result = floats(last_norm), halves(out)
    for row in range(first, last):
        scale = inverse_rms(residual + row * hidden * 4, hidden, limits[2])
        for i in range(hidden):
            result[row * hidden + i] = narrow(stream[row * hidden + i] * scale * gain[i])
    lap(watch, laps.FINAL)
    if count:
        weight, height, mine = words(head), tile_rows(count), normed
        first, last = share(count, rank, size)
        if count <= FEW:
            mine = room + (count + height - 1) // height * height * row_bytes(weight[GROUPS], weight[PAIRS])
            first, last = 0, count
        for i in range(first, last):
            at = residual + chosen[i] * hidden * 4
            pack_columns(
                at, inverse_rms(at, hidden, limits[2]), last_norm, hidden, mine, i, 0, height, weight[WIDTH]
            )
        if hidden < weight[WIDTH]:
            clear_padding(mine, first, last, hidden, height, weight[WIDTH])
        if count > FEW:
            meet(barrier, size)
        x = suited(weight, mine, count, rank, size, barrier, room, fixed)
        multiply(weight, x, count, rank, size, barrier, sums, STORE, logits, weight[OUTPUTS], 0, 0, 0)
        lap(watch, laps.HEAD)


@kernel
def advance(rank, size, barrier, call):
    """Bring conv and SSM states forward by the first counts[s] of the tokens whose projections `forward` kept from row starts[s] on.

    `wanted_rows` are the counts.
    """
    layers, linears, mamba, _, limits = _tables(call)
    w = words(call)
    shared, room = w[CALL.shared], w[CALL.private] + rank * w[CALL.private_bytes] + SUMS * 4
    sequences, starts, slots, positions = (
        w[CALL.sequences],
        words(w[CALL.starts]),
        words(w[CALL.slots]),
        words(w[CALL.positions]),
    )
    kept, kept_count, counts = w[CALL.draft_inputs], w[CALL.draft_count], words(w[CALL.wanted_rows])
    mambas, groups, states = 0, mamba[MAMBA.groups], mamba[MAMBA.state_size]
    inner = mamba[MAMBA.heads] * mamba[MAMBA.head_dim]
    first, last = share(sequences * groups, rank, size)
    channels = inner + 2 * groups * states
    for index in range(len(layers) - 1):
        layer = layers[index]
        if layer[LAYER.kernel] == MAMBA2_KERNEL:
            columns, width = (
                linears[layer[LAYER.first_linear], OUTPUTS],
                linears[layer[LAYER.first_linear] + 1, WIDTH],
            )
            for item in range(first, last):
                s, group = item // groups, item % groups
                rows = kept + (mambas * kept_count + starts[s]) * columns * 4
                conv = layer[AT + MAMBA_AT.conv] + slots[s] * (mamba[MAMBA.conv_kernel] - 1) * channels * 2
                ssm = layer[AT + MAMBA_AT.ssm] + slots[s] * inner * states * 4
                run_group(  # what comes out is not wanted: it goes to the first rows, of which there are enough
                    0,
                    counts[s],
                    positions[s],
                    group,
                    rows,
                    columns,
                    mamba,
                    layer[AT:],
                    limits,
                    conv,
                    ssm,
                    room,
                    shared,
                    1,
                    width,
                )
            mambas += 1


def private_size(rows: int, width: int, fixed: int, mamba: np.ndarray, attention: np.ndarray) -> int:
    """Bytes of scratch that each thread needs for a batch; `width` of the widest input, `fixed` bytes of the longest row of integers."""
    room = max(
        mamba_room.py_func(mamba) if mamba[MAMBA.groups] else 0,
        attention_room.py_func(attention) if attention[ATTENTION.kv_heads] else 0,
    )
    return int(-(-((min(rows, FEW) + 12) * (width * 2 + fixed) + (SUMS + room) * 4) // 64) * 64)
