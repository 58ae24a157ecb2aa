"""Loops written as vectors of 16: what LLVM would not find by itself, or would guard with checks for overlap."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.jit import inlined
from nanohybrid.ops.numba.llvm import F32, I64, PTR, V16F, Loop, floats, function, spread

ROWS = 4  # rows of a state at a time: B and C are loaded once for them


def _make(rows: int) -> Any:
    """`rows` rows of a state, 16 columns at a time: S = decay S + u B; sums of S C."""

    @intrinsic
    def update(
        typingctx: Any,
        state: Any,
        row_bytes: Any,
        B: Any,
        C: Any,
        inputs: Any,
        decay: Any,
        dt: Any,
        out: Any,
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
    inputs: Any,
    decay: Any,
    dt: Any,
    out: Any,
    columns: Any,
) -> None:
    fma = function(b, "llvm.fma.v16f32", V16F, [V16F] * 3)
    load = lambda address, kind: b.load(b.inttoptr(address, PTR), typ=kind, align=4)  # noqa: E731
    decays = spread(b, decay)
    u = [spread(b, b.fmul(dt, load(b.add(inputs, I64(4 * row)), F32))) for row in range(rows)]
    starts = [b.add(state, b.mul(row_bytes, I64(row))) for row in range(rows)]
    with Loop(b, columns, 16, [ir.Constant(V16F, [0.0] * 16)] * rows) as loop:
        offset = b.mul(loop.index, I64(4))
        b16, c16 = load(b.add(B, offset), V16F), load(b.add(C, offset), V16F)
        sums = []
        for row, total in enumerate(loop.values):
            place = b.add(starts[row], offset)
            updated = b.call(fma, [load(place, V16F), decays, b.fmul(u[row], b16)])
            b.store(updated, b.inttoptr(place, PTR), align=4)
            sums.append(b.call(fma, [updated, c16, total]))
        loop.close(sums)
    reduce = function(b, "llvm.vector.reduce.fadd.v16f32", F32, [F32, V16F])
    for row, total in enumerate(loop.results):
        call = b.call(reduce, [F32(0.0), total], fastmath=("reassoc",))
        b.store(call, b.inttoptr(b.add(out, I64(4 * row)), PTR), align=4)


_four, _one = _make(ROWS), _make(1)


@inlined
def state_rows(state, x, B, C, y, decay, dt, rows, columns):
    """One head: S [rows, columns] = decay S + (dt x) B^T and y = S C, in fp32, in place. All are addresses."""
    whole = columns // 16 * 16
    row = 0
    while whole and row + ROWS <= rows:
        _four(state + row * columns * 4, columns * 4, B, C, x + row * 4, decay, dt, y + row * 4, whole)
        row += ROWS
    while whole and row < rows:
        _one(state + row * columns * 4, columns * 4, B, C, x + row * 4, decay, dt, y + row * 4, whole)
        row += 1
    if whole < columns:
        _last_columns(state, x, B, C, y, decay, dt, rows, columns, whole)


@inlined
def _last_columns(state, x, B, C, y, decay, dt, rows, columns, whole):
    """The columns beyond the last whole vector."""
    kept, inputs, b, c, out = floats(state), floats(x), floats(B), floats(C), floats(y)
    for row in range(rows):
        total = out[row] if whole else dt * 0
        for n in range(whole, columns):
            updated = kept[row * columns + n] * decay + dt * inputs[row] * b[n]
            kept[row * columns + n] = updated
            total += updated * c[n]
        out[row] = total
