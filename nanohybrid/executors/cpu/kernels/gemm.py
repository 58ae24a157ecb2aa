"""A linear layer on packed weights: which tile for how many rows, and what becomes of a tile's sums.

A weight is described by nine words (`LINEAR` names them), so that a whole model is a table that kernels read. Outputs come in
units of 64; what K and the last unit are padded with is zeros.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.executors.cpu.kernels.gemm_int8 import OFFSET, fix_rows, row_bytes
from nanohybrid.executors.cpu.kernels.gemm_tile import FORMS, make_tiles
from nanohybrid.ops.numba.jit import called, inlined, kernel
from nanohybrid.ops.numba.llvm import floats, halves, hold, words
from nanohybrid.ops.numba.panels import pack_halves, pack_values, silu
from nanohybrid.ops.numba.scalars import narrow
from nanohybrid.ops.numba.threads import meet, new_round, next_of, share

LINEAR = ("form", "outputs", "inputs", "width", "units", "groups", "pairs", "block_bytes", "address")
FORM, OUTPUTS, INPUTS, WIDTH, UNITS, GROUPS, PAIRS, BLOCK_BYTES, ADDRESS = range(len(LINEAR))
PANELS = 4  # of 16 outputs, in a unit: what a thread's share is counted in

STORE, ADD, RELU2, GATE, HALVES = range(5)  # what becomes of the sums
SUMS = 24 * 16  # fp32 numbers of the largest tile
AHEAD = 4096  # bytes, where the next panels are too many to ask for all of them
NEAR = 384 * 1024  # bytes: panels that stay in the second level beside the ones at work
ROWS_AT_ONCE = 384  # rows whose activations stay near while all weights pass by
FEW = (
    24  # up to so many rows, each thread prepares all of them for itself rather than wait for a part of them
)
_OFFSETS = tuple(OFFSET.get(form, 0) for form in FORMS)  # 0: rows stay bfloat16

_HEIGHTS = (
    (1, 4),
    (2, 4),
    (4, 4),
    (8, 2),
    (12, 2),
)  # rows and panels of a tile, as `tile_rows` and `tile_panels` choose them
_tiles = make_tiles(
    [(form, *shape) for form in FORMS for shape in _HEIGHTS] + [("bf16", rows, 1) for rows, _ in _HEIGHTS]
)


@inlined
def tile_rows(rows):
    """Rows of a tile for a batch of `rows`."""
    if rows > 24:
        return 12
    return 8 if rows > 4 else (4 if rows > 2 else rows)


@inlined
def tile_panels(rows):
    """Panels of a tile of so many rows: as many sums as there are registers."""
    return 4 if rows <= 4 else 2


@called
def run_tile(form, rows, panels, w, step, group_step, x, out, stride, groups, pairs, ahead):
    """The tile of this form, so many rows, and as many panels as `tile_panels` says, or (bf16 only) one. Compiled once for all."""
    _tiles(form, rows, panels, w, step, group_step, x, out, stride, groups, pairs, ahead)


@called
def finish(sums, wide, rows, count, then, out, stride, row0, n0, other, other_rows, other_width):
    """Put away `rows` x `count` sums, which lie `wide` apart, as outputs n0... of rows row0...

    STORE, ADD: fp32 rows at `out`. HALVES: bfloat16 rows at `out`. RELU2: relu(sum)^2, packed at `other`.
    GATE: silu(out) * sum, packed at `other`, where `out` holds the gate's sums.
    """
    numbers, target = floats(sums), floats(out)
    for row in range(rows):
        at, source = (row0 + row) * stride + n0, row * wide
        if then == RELU2:
            for n in range(count):
                value = numbers[source + n]
                value = value if not (value < np.float32(0)) else np.float32(0)
                numbers[source + n] = value * value
        elif then == GATE:
            for n in range(count):
                numbers[source + n] *= silu(target[at + n])
        elif then == HALVES:
            words = halves(out)
            for n in range(count):
                words[at + n] = narrow(numbers[source + n])
        elif then == ADD:
            for n in range(count):
                target[at + n] += numbers[source + n]
        else:
            for n in range(count):
                target[at + n] = numbers[source + n]
    if then in (RELU2, GATE):
        for row in range(rows):
            pack_values(sums + row * wide * 4, count, other, row0 + row, n0, other_rows, other_width)


@called
def suited(weight, x, rows, rank, size, barrier, own, common):
    """The packed rows at `x` as the tiles of this weight read them: as they are, or made integers, in `own` or, many of them, `common`."""
    offset = _OFFSETS[weight[FORM]]
    if offset == 0:
        return x
    height = tile_rows(rows)
    tiles = (rows + height - 1) // height
    if rows <= FEW:
        fix_rows(x, 0, tiles, height, weight[GROUPS], weight[PAIRS], offset, own)
        return own
    meet(barrier, size)  # others may still read what another weight made of these rows
    first, last = share(tiles, rank, size)
    fix_rows(x, first, last, height, weight[GROUPS], weight[PAIRS], offset, common)
    meet(barrier, size)
    return common


@inlined
def tile_bytes(weight, height):
    """Of a tile of rows as `suited` leaves them."""
    return height * (
        row_bytes(weight[GROUPS], weight[PAIRS]) if _OFFSETS[weight[FORM]] else weight[WIDTH] * 2
    )


@called
def multiply(weight, x, rows, rank, size, barrier, sums, then, out, stride, other, other_rows, other_width):
    """This thread's part of the outputs of one linear layer, for `rows` rows as `suited` left them; `finish` says what becomes of them.

    barrier: where threads see who has done what, and take over from each other; 0: each has a fixed share, always the same.
    """
    height = tile_rows(rows)
    panels = tile_panels(height)
    wide = panels * 16
    step, x_step = weight[BLOCK_BYTES], tile_bytes(weight, height)
    apart = weight[GROUPS] * step  # bytes of a panel
    ahead = panels * apart if panels * apart <= NEAR else AHEAD
    first, last = share(weight[UNITS], rank, size)
    hand, unit = 0, first if first < last else -1
    if barrier and size > 1:
        hand = new_round(barrier, rank, size)
        unit = next_of(hand, weight[UNITS], rank, size)
    while unit >= 0:
        for panel in range(unit * PANELS, (unit + 1) * PANELS, panels):
            n0 = panel * 16
            if n0 < weight[OUTPUTS]:
                w = weight[ADDRESS] + panel * apart
                count = min(wide, weight[OUTPUTS] - n0)
                for tile in range((rows + height - 1) // height):
                    rows_at, groups, pairs = x + tile * x_step, weight[GROUPS], weight[PAIRS]
                    run_tile(
                        weight[FORM],
                        height,
                        panels,
                        w,
                        apart,
                        step,
                        rows_at,
                        sums,
                        wide * 4,
                        groups,
                        pairs,
                        ahead,
                    )
                    here = min(height, rows - tile * height)
                    finish(
                        sums,
                        wide,
                        here,
                        count,
                        then,
                        out,
                        stride,
                        tile * height,
                        n0,
                        other,
                        other_rows,
                        other_width,
                    )
        if hand:
            unit = next_of(hand, weight[UNITS], rank, size)
        else:
            unit = unit + 1 if unit + 1 < last else -1


@kernel
def matmul(rank, size, barrier, call):
    """out [rows, outputs] = x [rows, inputs] W^T, x in bfloat16, out in fp32 where `full`, else in bfloat16; `packed` and
    `fixed` are room for ROWS_AT_ONCE packed rows, and for as many made integers."""
    given = words(call)
    weight, x, x_stride, rows = words(given[0]), given[1], given[2], given[3]
    packed, fixed, full, out = given[4], given[5], given[6], given[7]
    room = np.empty(SUMS, dtype=np.float32)
    done = 0
    while done < rows:
        here = min(ROWS_AT_ONCE, rows - done)
        height = tile_rows(here)
        first, last = share((here + height - 1) // height, rank, size)
        source = x + done * x_stride * 2
        pack_halves(source, x_stride, first, last, here, weight[INPUTS], packed, height, weight[WIDTH])
        offset, ready = _OFFSETS[weight[FORM]], packed
        if offset:
            fix_rows(packed, first, last, height, weight[GROUPS], weight[PAIRS], offset, fixed)
            ready = fixed
        meet(barrier, size)
        target = out + done * weight[OUTPUTS] * (4 if full else 2)
        then = STORE if full else HALVES
        multiply(
            weight, ready, here, rank, size, barrier, room.ctypes.data, then, target, weight[OUTPUTS], 0, 0, 0
        )
        meet(barrier, size)
        done += here
    hold(room)
