"""A linear layer on packed weights: which tile computes how many rows, and what is done with a tile's sums.

A weight is described by nine words (`LINEAR`), so a whole model is a table that kernels read. Outputs come in
units of 64; the padding of K and of the last unit is zeros.
"""

from __future__ import annotations

import numpy as np

from nanohybrid.executors.cpu.kernels.gemm_int8 import CODE_OFFSET
from nanohybrid.executors.cpu.kernels.gemm_tile import FORMATS, make_tiles
from nanohybrid.executors.cpu.kernels.quantize_rows import quantize_rows, quantized_row_bytes
from nanohybrid.ops.numba.jit import inline, kernel, noinline
from nanohybrid.ops.numba.memory import (
    BF16_BYTES,
    F32_BYTES,
    as_bf16,
    as_f32,
    as_i64,
    bf16_at,
    f32_at,
    keep_alive,
)
from nanohybrid.ops.numba.panels import pack_bf16_tiles, pack_values, silu
from nanohybrid.ops.numba.scalars import f32_to_bf16
from nanohybrid.ops.numba.threads import barrier_wait, begin_stealing, next_or_steal, partition

LINEAR = ("format", "outputs", "inputs", "width", "units", "groups", "pairs", "block_bytes", "address")
FORMAT, OUTPUTS, INPUTS, WIDTH, UNITS, GROUPS, PAIRS, BLOCK_BYTES, ADDRESS = range(len(LINEAR))
UNIT_PANELS = 4  # panels of 16 outputs in a unit; threads partition units

STORE, ADD, RELU2, GATE, STORE_BF16 = range(5)  # epilogues
TILE_SUMS = 24 * 16  # fp32 numbers of the largest tile
PREFETCH_BYTES = 4096  # how far ahead to prefetch where the next panels do not fit in the L2 cache
L2_BYTES = 384 * 1024  # of panels that stay in the L2 cache beside the current ones
MAX_ROWS = 384  # rows whose activations stay in cache while all weights are read
# Up to so many rows every thread prepares all of them for itself, rather than wait at a barrier for its part
# of them.
REPLICATED_ROWS = 24
_OFFSETS = tuple(CODE_OFFSET.get(name, 0) for name in FORMATS)  # 0: rows stay bfloat16

TILE_SHAPES = ((1, 4), (2, 4), (4, 4), (8, 2), (12, 2))  # rows and panels, see `tile_rows` and `tile_panels`
_tiles = make_tiles(
    [(name, *shape) for name in FORMATS for shape in TILE_SHAPES]
    + [("bf16", rows, 1) for rows, _ in TILE_SHAPES]
)


@inline
def tile_rows(rows):
    """Rows of a tile for a batch of `rows`."""
    if rows > 24:
        return 12
    return 8 if rows > 4 else (4 if rows > 2 else rows)


@inline
def tile_panels(rows):
    """Panels of a tile of so many rows: as many sums as there are registers."""
    return 4 if rows <= 4 else 2


@noinline
def run_tile(format, rows, panels, w, step, group_step, x, out, stride, groups, pairs, prefetch):
    """One tile of gemm_tile.make_tiles, compiled once for all its users.

    Panels: `tile_panels` of them, or (bf16 only) one.
    """
    _tiles(format, rows, panels, w, step, group_step, x, out, stride, groups, pairs, prefetch)


@noinline
def apply_epilogue(sums, wide, rows, count, epilogue, out, stride, row0, n0, other, other_rows, other_width):
    """Write `rows` x `count` sums, whose rows are `wide` apart, as the outputs n0... of the rows row0...

    STORE, ADD: fp32 rows at `out`. STORE_BF16: bfloat16 rows at `out`. RELU2: relu(sum)^2, packed at `other`.
    GATE: silu(out) * sum, packed at `other`, where `out` holds the gate's sums.
    """
    numbers, target = as_f32(sums), as_f32(out)
    for row in range(rows):
        at, source = (row0 + row) * stride + n0, row * wide
        if epilogue == RELU2:
            for n in range(count):
                value = numbers[source + n]
                value = value if not (value < np.float32(0)) else np.float32(0)
                numbers[source + n] = value * value
        elif epilogue == GATE:
            for n in range(count):
                numbers[source + n] *= silu(target[at + n])
        elif epilogue == STORE_BF16:
            bits = as_bf16(out)
            for n in range(count):
                bits[at + n] = f32_to_bf16(numbers[source + n])
        elif epilogue == ADD:
            for n in range(count):
                target[at + n] += numbers[source + n]
        else:
            for n in range(count):
                target[at + n] = numbers[source + n]
    if epilogue in (RELU2, GATE):
        for row in range(rows):
            pack_values(f32_at(sums, row * wide), count, other, row0 + row, n0, other_rows, other_width)


@noinline
def quantize_activations(weight, x, rows, rank, size, control, own, shared):
    """The packed rows at `x` as this weight's tiles read them: unchanged for bf16, else as integers.

    Quantized rows go to `own`, this thread's memory, or with more than REPLICATED_ROWS to `shared`, which all
    threads fill.
    """
    offset = _OFFSETS[weight[FORMAT]]
    if offset == 0:
        return x
    height = tile_rows(rows)
    tiles = (rows + height - 1) // height
    if rows <= REPLICATED_ROWS:
        quantize_rows(x, 0, tiles, height, weight[GROUPS], weight[PAIRS], offset, own)
        return own
    barrier_wait(control, size)  # other threads may still read the rows as another weight has quantized them
    first, last = partition(tiles, rank, size)
    quantize_rows(x, first, last, height, weight[GROUPS], weight[PAIRS], offset, shared)
    barrier_wait(control, size)
    return shared


@inline
def tile_bytes(weight, height):
    """Bytes of a tile of rows as `quantize_activations` gives them."""
    row_bytes = (
        quantized_row_bytes(weight[GROUPS], weight[PAIRS])
        if _OFFSETS[weight[FORMAT]]
        else weight[WIDTH] * BF16_BYTES
    )
    return height * row_bytes


@noinline
def gemm(weight, x, rows, rank, size, control, sums, epilogue, out, stride, other, other_rows, other_width):
    """This thread's part of the outputs of one linear, for rows that `quantize_activations` has prepared.

    control: threads steal units from each other; 0: each thread has a static partition, the same for every
    layer. The other arguments are those of `apply_epilogue`.
    """
    height = tile_rows(rows)
    panels = tile_panels(height)
    wide = panels * 16
    step, x_step = weight[BLOCK_BYTES], tile_bytes(weight, height)
    panel_bytes = weight[GROUPS] * step
    prefetch = panels * panel_bytes if panels * panel_bytes <= L2_BYTES else PREFETCH_BYTES
    first, last = partition(weight[UNITS], rank, size)
    counters, unit = 0, first if first < last else -1
    if control and size > 1:
        counters = begin_stealing(control, rank, size)
        unit = next_or_steal(counters, weight[UNITS], rank, size)
    while unit >= 0:
        for panel in range(unit * UNIT_PANELS, (unit + 1) * UNIT_PANELS, panels):
            n0 = panel * 16
            if n0 < weight[OUTPUTS]:
                w = weight[ADDRESS] + panel * panel_bytes
                count = min(wide, weight[OUTPUTS] - n0)
                for tile in range((rows + height - 1) // height):
                    row0 = tile * height
                    run_tile(
                        weight[FORMAT], height, panels, w, panel_bytes, step, x + tile * x_step, sums, wide *
                        F32_BYTES, weight[GROUPS], weight[PAIRS], prefetch,
                    )  # fmt: skip
                    apply_epilogue(
                        sums, wide, min(height, rows - row0), count, epilogue, out, stride, row0, n0, other,
                        other_rows, other_width,
                    )  # fmt: skip
        if counters:
            unit = next_or_steal(counters, weight[UNITS], rank, size)
        else:
            unit = unit + 1 if unit + 1 < last else -1


@kernel
def matmul(rank, size, control, call):
    """out [rows, outputs] = x [rows, inputs] W^T. x is bfloat16; out is fp32 where `full`, else bfloat16.

    packed, quantized: scratch for MAX_ROWS packed rows, and for as many quantized ones.
    """
    args = as_i64(call)
    weight, x, x_stride, rows = as_i64(args[0]), args[1], args[2], args[3]
    packed, quantized, full, out = args[4], args[5], args[6], args[7]
    scratch = np.empty(TILE_SUMS, dtype=np.float32)
    sums, out_bytes, epilogue = (
        scratch.ctypes.data,
        F32_BYTES if full else BF16_BYTES,
        STORE if full else STORE_BF16,
    )
    done = 0
    while done < rows:
        count = min(MAX_ROWS, rows - done)
        height = tile_rows(count)
        first, last = partition((count + height - 1) // height, rank, size)
        source = bf16_at(x, done * x_stride)
        pack_bf16_tiles(source, x_stride, first, last, count, weight[INPUTS], packed, height, weight[WIDTH])
        offset, prepared = _OFFSETS[weight[FORMAT]], packed
        if offset:
            quantize_rows(packed, first, last, height, weight[GROUPS], weight[PAIRS], offset, quantized)
            prepared = quantized
        barrier_wait(control, size)
        target = out + done * weight[OUTPUTS] * out_bytes
        gemm(weight, prepared, count, rank, size, control, sums, epilogue, target, weight[OUTPUTS], 0, 0, 0)
        barrier_wait(control, size)
        done += count
    keep_alive(scratch)
