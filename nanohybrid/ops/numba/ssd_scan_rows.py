"""The two inner loops of the scan's gradient, as vectors of 16 columns and four rows of a state at a time.

A state is [rows, columns] in fp32, columns a whole number of vectors, rows a multiple of four; all arguments are addresses.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.llvm import F32, I64, PTR, V16F, Loop, function, spread

ROWS = 4  # B, C and a token's row of sums are loaded once for them

_WORD, _NUMBER = types.int64, types.float32


class _Rows:
    """What both loops need: loads, stores, fused products, and a number of each row in all lanes."""

    def __init__(self, builder: ir.IRBuilder, state: Any, columns: Any) -> None:
        self.b, self.columns = builder, columns
        self.fma = function(builder, "llvm.fma.v16f32", V16F, [V16F] * 3)
        row_bytes = builder.mul(columns, I64(4))
        self.starts = [builder.add(state, builder.mul(row_bytes, I64(row))) for row in range(ROWS)]

    def load(self, address: Any, kind: ir.Type = V16F) -> Any:
        return self.b.load(self.b.inttoptr(address, PTR), typ=kind, align=4)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, PTR), align=4)

    def each(self, address: Any) -> list[Any]:
        return [spread(self.b, self.load(self.b.add(address, I64(4 * row)), F32)) for row in range(ROWS)]

    def add_product(self, x: Any, y: Any, to: Any) -> Any:
        return self.b.call(self.fma, [x, y, to])


@intrinsic
def advance(
    typingctx: Any, state: Any, B: Any, fed: Any, dy: Any, decay: Any, sums: Any, columns: Any
) -> Any:
    """S = decay S + fed B^T; sums += S^T dy: the state after a token, and this token's gradient of C."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        at_state, at_B, at_fed, at_dy, decay_, at_sums, columns_ = arguments
        rows = _Rows(b, at_state, columns_)
        decays, feds, dys = spread(b, decay_), rows.each(at_fed), rows.each(at_dy)
        with Loop(b, columns_, 16, []) as loop:
            offset = b.mul(loop.index, I64(4))
            b16, total = rows.load(b.add(at_B, offset)), rows.load(b.add(at_sums, offset))
            for row in range(ROWS):
                place = b.add(rows.starts[row], offset)
                updated = rows.add_product(rows.load(place), decays, b.fmul(feds[row], b16))
                rows.store(updated, place)
                total = rows.add_product(updated, dys[row], total)
            rows.store(total, b.add(at_sums, offset))
            loop.close([])
        return context.get_dummy_value()

    return types.void(_WORD, _WORD, _WORD, _WORD, _NUMBER, _WORD, _WORD), generate


@intrinsic
def retreat(
    typingctx: Any,
    slope: Any,
    B: Any,
    C: Any,
    fed: Any,
    dy: Any,
    decay: Any,
    sums: Any,
    dfed: Any,
    columns: Any,
) -> Any:
    """dS = decay dS + dy C^T; dfed = dS B; sums += dS^T fed: the state's gradient before a token, that of what was fed and of B."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        at_slope, at_B, at_C, at_fed, at_dy, decay_, at_sums, at_dfed, columns_ = arguments
        rows = _Rows(b, at_slope, columns_)
        decays, feds, dys = spread(b, decay_), rows.each(at_fed), rows.each(at_dy)
        with Loop(b, columns_, 16, [ir.Constant(V16F, [0.0] * 16)] * ROWS) as loop:
            offset = b.mul(loop.index, I64(4))
            b16, c16 = rows.load(b.add(at_B, offset)), rows.load(b.add(at_C, offset))
            total = rows.load(b.add(at_sums, offset))
            found = []
            for row, so_far in enumerate(loop.values):
                place = b.add(rows.starts[row], offset)
                updated = rows.add_product(rows.load(place), decays, b.fmul(dys[row], c16))
                rows.store(updated, place)
                found.append(rows.add_product(updated, b16, so_far))
                total = rows.add_product(updated, feds[row], total)
            rows.store(total, b.add(at_sums, offset))
            loop.close(found)
        reduce = function(b, "llvm.vector.reduce.fadd.v16f32", F32, [F32, V16F])
        for row, total in enumerate(loop.results):
            call = b.call(reduce, [F32(0.0), total], fastmath=("reassoc",))
            rows.store(call, b.add(at_dfed, I64(4 * row)))
        return context.get_dummy_value()

    return types.void(*[_WORD] * 5, _NUMBER, *[_WORD] * 3), generate
