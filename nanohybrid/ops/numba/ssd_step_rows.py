"""One token of the SSD recurrence for some rows of one head's state, in vectors of 16 columns.

    S = exp(dt A) S + (dt x) B^T        y = S C        (Dao & Gu 2024, section 2)

Written as LLVM IR: LLVM would not find these vectors by itself, or would guard the loops with checks for
overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.jit import inline
from nanohybrid.ops.numba.llvm import F32, I64, PTR, V16F, Loop, function, splat
from nanohybrid.ops.numba.memory import as_f32, f32_at

ROWS = 4  # rows of a state at a time: B and C are loaded once for them


def _make(rows: int) -> Any:
    """The intrinsic for `rows` rows of a state."""

    @intrinsic
    def update(
        typingctx: Any,
        state: Any,
        row_bytes: Any,
        B: Any,
        C: Any,
        x: Any,
        decay: Any,
        dt: Any,
        y: Any,
        columns: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _emit(builder, rows, *arguments)
            return context.get_dummy_value()

        word, number = types.int64, types.float32
        return types.void(word, word, word, word, word, number, number, word, word), generate

    return update


def _emit(
    b: ir.IRBuilder,
    rows: int,
    state: Any,
    row_bytes: Any,
    B: Any,
    C: Any,
    x: Any,
    decay: Any,
    dt: Any,
    y: Any,
    columns: Any,
) -> None:
    fma = function(b, "llvm.fma.v16f32", V16F, [V16F] * 3)
    load = lambda address, kind: b.load(b.inttoptr(address, PTR), typ=kind, align=4)  # noqa: E731
    decays = splat(b, decay)
    dtx = [splat(b, b.fmul(dt, load(b.add(x, I64(4 * row)), F32))) for row in range(rows)]
    starts = [b.add(state, b.mul(row_bytes, I64(row))) for row in range(rows)]
    with Loop(b, columns, 16, [ir.Constant(V16F, [0.0] * 16)] * rows) as loop:
        offset = b.mul(loop.index, I64(4))
        b16, c16 = load(b.add(B, offset), V16F), load(b.add(C, offset), V16F)
        sums = []
        for row, total in enumerate(loop.values):
            place = b.add(starts[row], offset)
            updated = b.call(fma, [load(place, V16F), decays, b.fmul(dtx[row], b16)])
            b.store(updated, b.inttoptr(place, PTR), align=4)
            sums.append(b.call(fma, [updated, c16, total]))
        loop.close(sums)
    reduce = function(b, "llvm.vector.reduce.fadd.v16f32", F32, [F32, V16F])
    for row, total in enumerate(loop.results):
        call = b.call(reduce, [F32(0.0), total], fastmath=("reassoc",))
        b.store(call, b.inttoptr(b.add(y, I64(4 * row)), PTR), align=4)


_four_rows, _one_row = _make(ROWS), _make(1)


@inline
def update_state_rows(state, x, B, C, y, decay, dt, rows, columns):
    """S [rows, columns] = decay S + (dt x) B^T in place, and y = S C, in fp32; all but the last four
    arguments are addresses.
    """
    whole = columns // 16 * 16
    row, row_bytes = 0, columns * 4
    while whole and row + ROWS <= rows:
        at = f32_at(state, row * columns)
        _four_rows(at, row_bytes, B, C, f32_at(x, row), decay, dt, f32_at(y, row), whole)
        row += ROWS
    while whole and row < rows:
        at = f32_at(state, row * columns)
        _one_row(at, row_bytes, B, C, f32_at(x, row), decay, dt, f32_at(y, row), whole)
        row += 1
    if whole < columns:
        _last_columns(state, x, B, C, y, decay, dt, rows, columns, whole)


@inline
def _last_columns(state, x, B, C, y, decay, dt, rows, columns, whole):
    """The columns after the last whole vector; adds to the y of the whole vectors."""
    S, inputs, b, c, out = as_f32(state), as_f32(x), as_f32(B), as_f32(C), as_f32(y)
    for row in range(rows):
        total = out[row] if whole else dt * 0
        for n in range(whole, columns):
            updated = S[row * columns + n] * decay + dt * inputs[row] * b[n]
            S[row * columns + n] = updated
            total += updated * c[n]
        out[row] = total
