"""One token for each of B sequences through the whole model, in one kernel: weights pass by once, whatever B is.

The model is a table: LAYERS' words for each layer, LINEAR's words for each linear. Threads share the outputs of a linear, the
groups of a Mamba-2 layer and the key/value heads of an attention layer, and meet where one needs what another made: three times
a layer with a mixer between two projections, twice an MLP. The residual stream and all sums are fp32; activations enter a
linear as bfloat16. Nothing that is computed for a sequence depends on the others in the batch, not even the order of its sums.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.ops.cpu.attend import attend_head, attention_room
from nanohybrid.ops.cpu.compiled import inlined, kernel
from nanohybrid.ops.cpu.linear import ADD, GATE, INPUTS, OUTPUTS, RELU2, STORE, SUMS, WIDTH, multiply, tile_rows
from nanohybrid.ops.cpu.llvm import floats, halves
from nanohybrid.ops.cpu.mamba import mamba_room, step_group
from nanohybrid.ops.cpu.rows import clear, clear_padding, norm_and_pack
from nanohybrid.ops.cpu.scalars import widen
from nanohybrid.ops.cpu.team import meet, share

KINDS = ("M", "*", "-")
LAYERS = ("kind", "norm", "first linear", *(f"address {i}" for i in range(10)))
KIND, NORM, LINEARS, AT = 0, 1, 2, 3  # AT: what the mixer's own kernel reads, see `program`


@inlined
def _mamba(layer, linears, batch, slots, positions, projected, sizes, limits, room, packed, rank, size):  # type: ignore[no-untyped-def]
    """The groups of all sequences, shared out."""
    width, height = linears[layer[LINEARS] + 1, WIDTH], tile_rows(batch)
    columns = linears[layer[LINEARS], OUTPUTS]
    heads, head_dim, groups, states, window = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    channels = heads * head_dim + 2 * groups * states
    first, last = share(batch * groups, rank, size)
    for item in range(first, last):
        row, group = item // groups, item % groups
        conv = layer[AT] + slots[row] * (window - 1) * channels * 2
        ssm = layer[AT + 1] + slots[row] * heads * head_dim * states * 4
        mine = projected + row * columns * 4
        step_group(positions[row] == 0, row, group, mine, sizes, layer[AT:], limits, conv, ssm, room, packed, height, width)


@inlined
def _attention(layer, linears, batch, positions, pages, projected, sizes, limits, angles, room, packed, rank, size):  # type: ignore[no-untyped-def]
    """The key/value heads of all sequences, shared out."""
    at = layer[LINEARS]
    width, height = linears[at + 3, WIDTH], tile_rows(batch)
    columns = (sizes[0] + 2 * sizes[1]) * sizes[2]
    first, last = share(batch * sizes[1], rank, size)
    for item in range(first, last):
        row, head = item // sizes[1], item % sizes[1]
        turned = angles + row * sizes[2] * 4 if angles else 0
        table = pages.ctypes.data + row * pages.shape[1] * 8
        mine = projected + row * columns * 4
        attend_head(
            row, head, mine, sizes, layer[AT + 2 :], limits[2], layer[AT], layer[AT + 1],
            table, positions[row], turned, room, packed, height, width,
        )  # fmt: skip


@kernel
def decode(rank, size, barrier, layers, linears, mamba, attention, limits, embeddings, tokens, slots, positions, pages, angles,
           residual, projected, shared, private, private_bytes, logits):  # type: ignore[no-untyped-def]  # fmt: skip
    """Logits [B, V] in fp32 of the next token of each sequence; states and pages are brought up to date in place.

    layers, linears: the tables; their last two rows are the final norm and the head. mamba: H, P, G, N, W. attention: query
    heads, key/value heads, head size, page size, gated (1: SwiGLU). limits: dt's least and most, eps. angles: rotary cos and
    sin of each row, or 0. residual [B, E], projected [B, widest]: fp32 room. shared: packed rows. private: each thread's own.
    """
    batch, hidden = len(tokens), linears[len(linears) - 1, INPUTS]
    height = tile_rows(batch)
    rows = (batch + height - 1) // height * height
    normed = private + rank * private_bytes
    sums = normed + rows * linears[len(linears) - 1, WIDTH] * 2
    room = sums + SUMS * 4
    clear(normed, rows * linears[len(linears) - 1, WIDTH])
    table, stream = halves(embeddings), floats(residual)
    first, last = share(batch, rank, size)
    for row in range(first, last):
        for i in range(hidden):
            stream[row * hidden + i] = widen(table[tokens[row] * hidden + i])
    meet(barrier, size)
    for index in range(len(layers) - 1):
        layer = layers[index]
        at = layer[LINEARS]
        norm_and_pack(residual, hidden, batch, hidden, layer[NORM], limits[2], normed, height, linears[at, WIDTH])
        if layer[KIND] == 0:
            columns = linears[at, OUTPUTS]
            multiply(linears[at], normed, batch, rank, size, sums, STORE, projected, columns, 0, 0, 0)
            meet(barrier, size)
            _mamba(layer, linears, batch, slots, positions, projected, mamba, limits, room, shared, rank, size)
            back = at + 1
        elif layer[KIND] == 1:
            columns, offset = (attention[0] + 2 * attention[1]) * attention[2], 0
            for part in range(3):
                multiply(linears[at + part], normed, batch, rank, size, sums, STORE, projected + offset * 4, columns, 0, 0, 0)
                offset += linears[at + part, OUTPUTS]
            meet(barrier, size)
            _attention(layer, linears, batch, positions, pages, projected, attention, limits, angles, room, shared, rank, size)
            back = at + 3
        elif attention[4]:
            columns, width = linears[at, OUTPUTS], linears[at + 2, WIDTH]
            multiply(linears[at], normed, batch, rank, size, sums, STORE, projected, columns, 0, 0, 0)
            multiply(linears[at + 1], normed, batch, rank, size, sums, GATE, projected, columns, shared, height, width)
            back = at + 2
        else:
            multiply(linears[at], normed, batch, rank, size, sums, RELU2, 0, 0, shared, height, linears[at + 1, WIDTH])
            back = at + 1
        if rank == 0 and linears[back, INPUTS] < linears[back, WIDTH]:
            clear_padding(shared, rows, linears[back, INPUTS], height, linears[back, WIDTH])
        meet(barrier, size)
        multiply(linears[back], shared, batch, rank, size, sums, ADD, residual, hidden, 0, 0, 0)
        meet(barrier, size)
    final, head = layers[len(layers) - 1], linears[len(linears) - 1]
    norm_and_pack(residual, hidden, batch, hidden, final[NORM], limits[2], normed, height, head[WIDTH])
    multiply(head, normed, batch, rank, size, sums, STORE, logits, head[OUTPUTS], 0, 0, 0)


def private_size(batch: int, width: int, mamba: np.ndarray, attention: np.ndarray) -> int:
    """Bytes of scratch that each thread needs for a batch."""
    height = tile_rows.py_func(batch)
    rows = -(-batch // height) * height
    room = max(mamba_room.py_func(mamba) if mamba[2] else 0, attention_room.py_func(attention) if attention[1] else 0)
    return -(-(rows * width * 2 + (SUMS + room) * 4) // 64) * 64
