"""A ragged batch of tokens through the whole model, in one kernel: weights pass by once, however many tokens there are.

The model is a table: LAYERS' words for each layer, LINEAR's words for each linear. Threads share the outputs of a linear, the
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

KINDS = ("M", "*", "-")
LAYERS = ("kind", "norm", "first linear", *(f"address {i}" for i in range(8)))
KIND, NORM, LINEARS, AT = 0, 1, 2, 3  # AT: what the mixer's own kernel reads, see mamba.py and attend.py

# The words of a call. First the model and whatever else stays from step to step ...
MODEL = ("layers", "how many", "linears", "how many", "mamba", "attention", "limits", "embeddings", "head")
ROOM = ("residual", "projected", "normed", "fixed", "shared", "private", "private bytes")
BATCH = (
    "tokens",
    "rows",
    "sequences",
    "starts",
    "slots",
    "positions",
    "pages",
    "pages of a sequence",
    "angles",
)
WANTED = (
    "kept",
    "rows",
    "count",
    "out",
    "logits",
    "chosen",
    "count",
    "clock",
)  # ... then what is wanted of it
AT_ROOM = len(MODEL)
AT_BATCH = AT_ROOM + len(ROOM)
AT_WANTED = AT_BATCH + len(BATCH)


@inlined
def _tables(call):
    """layers, linears, and the numbers that are the same for all of them."""
    w = words(call)
    layers, linears = (
        numba.carray(words(w[0]), (w[1], len(LAYERS))),
        numba.carray(words(w[2]), (w[3], len(LINEAR))),
    )
    mamba, attention = numba.carray(words(w[4]), (5,)), numba.carray(words(w[5]), (4,))
    return layers, linears, mamba, attention, numba.carray(floats(w[6]), (3,))


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
    heads, head_dim, groups, states, window = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    channels = heads * head_dim + 2 * groups * states
    first, last = share(sequences * groups, rank, size)
    for item in range(first, last):
        sequence, group = item // groups, item % groups
        start, slot = starts[sequence], slots[sequence]
        conv = layer[AT] + slot * (window - 1) * channels * 2
        ssm = layer[AT + 1] + slot * heads * head_dim * states * 4
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
    at, kv_heads = layer[AT:], sizes[1]
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

    layers, linears: the tables; the last row of layers is the final norm. mamba: H, P, G, N, W. attention: query heads, key/value
    heads, head size, gated (1: SwiGLU). limits: dt's least and most, eps. head: its linear's words, or 0. Sequence s has the rows
    starts[s] to starts[s + 1], and stands at positions[s]. angles: rotary cos and sin of each row, or 0. kept: where a copy of a row's
    Mamba-2 projections goes, in each layer the rows[row]-th of `count` (-1: nowhere). residual [T, E], projected [T, widest]: fp32 room;
    normed, shared: packed rows; fixed: rows made integers. logits: fp32 [count, V] of the rows `chosen`. clock: where each thread's
    phases are timed (clock.py), or 0.
    """
    layers, linears, mamba, attention, limits = _tables(call)
    w = words(call)
    embeddings, head = w[AT_ROOM - 2], w[AT_ROOM - 1]
    given = words(call + AT_ROOM * 8)
    residual, projected, normed, fixed, shared, private = (
        given[0],
        given[1],
        given[2],
        given[3],
        given[4],
        given[5] + rank * given[6],
    )
    given = words(call + AT_BATCH * 8)
    tokens, rows, sequences, starts, slots = (
        words(given[0]),
        given[1],
        given[2],
        words(given[3]),
        words(given[4]),
    )
    positions, pages, page_bytes, angles = words(given[5]), given[6], given[7] * 8, given[8]
    given = words(call + AT_WANTED * 8)
    kept, kept_rows, kept_count, out = given[0], words(given[1]), given[2], given[3]
    logits, chosen, count, clock = given[4], words(given[5]), given[6], given[7]
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
        at = layer[LINEARS]
        norm_and_pack(
            residual, norm_first, norm_last, hidden, layer[NORM], limits[2], mine, height, linears[at, WIDTH]
        )
        lap(watch, laps.NORMS)
        if rows > FEW:
            meet(barrier, size)
            lap(watch, laps.WAITING)
        if layer[KIND] == 0:
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
        elif layer[KIND] == 1:
            columns, offset, width = (
                (attention[0] + 2 * attention[1]) * attention[2],
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
        elif attention[3]:
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
    last_norm = layers[len(layers) - 1, NORM]
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
def feed(rank, size, barrier, call):
    """Bring conv and SSM states forward by the first counts[s] of the tokens whose projections `forward` kept from row starts[s] on.

    Of a call's words it reads the tables, room, sequences, starts, slots, positions and kept; and `chosen` as the counts.
    """
    layers, linears, mamba, _, limits = _tables(call)
    given = words(call + AT_ROOM * 8)
    shared, room = given[4], given[5] + rank * given[6] + SUMS * 4
    given = words(call + AT_BATCH * 8)
    sequences, starts, slots, positions = given[2], words(given[3]), words(given[4]), words(given[5])
    given = words(call + AT_WANTED * 8)
    kept, kept_count, counts = given[0], given[2], words(given[5])
    mambas, groups = 0, mamba[2]
    first, last = share(sequences * groups, rank, size)
    channels = mamba[0] * mamba[1] + 2 * groups * mamba[3]
    for index in range(len(layers) - 1):
        layer = layers[index]
        if layer[KIND] == 0:
            columns, width = linears[layer[LINEARS], OUTPUTS], linears[layer[LINEARS] + 1, WIDTH]
            for item in range(first, last):
                s, group = item // groups, item % groups
                rows = kept + (mambas * kept_count + starts[s]) * columns * 4
                conv = layer[AT] + slots[s] * (mamba[4] - 1) * channels * 2
                ssm = layer[AT + 1] + slots[s] * mamba[0] * mamba[1] * mamba[3] * 4
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
        mamba_room.py_func(mamba) if mamba[2] else 0, attention_room.py_func(attention) if attention[1] else 0
    )
    return int(-(-((min(rows, FEW) + 12) * (width * 2 + fixed) + (SUMS + room) * 4) // 64) * 64)
