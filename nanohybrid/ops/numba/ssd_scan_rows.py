"""The inner loops of the SSD scan's gradient, in vectors of 16 columns for four rows of a state.

A state is [rows, columns] in fp32. `columns` is a multiple of 16, `rows` a multiple of four. The arguments
are addresses, except the decay, an fp32 number, and `columns`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.llvm import F32, I64, PTR, V16F, Loop, function, splat

ROWS = 4  # of a state at a time: B, C and a token's sums are loaded once for them

_WORD, _NUMBER = types.int64, types.float32


class _Rows:
    """IR that both loops use: loads, stores, fused multiply-adds, and a scalar of each row in all lanes."""

    def __init__(self, builder: ir.IRBuilder, state: Any, columns: Any) -> None:
        self.b, self.columns = builder, columns
        self.fma = function(builder, "llvm.fma.v16f32", V16F, [V16F] * 3)
        row_bytes = builder.mul(columns, I64(4))
        self.starts = [builder.add(state, builder.mul(row_bytes, I64(row))) for row in range(ROWS)]

    def load(self, address: Any, kind: ir.Type = V16F) -> Any:
        return self.b.load(self.b.inttoptr(address, PTR), typ=kind, align=4)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, PTR), align=4)

    def splat_each(self, address: Any) -> list[Any]:
        return [splat(self.b, self.load(self.b.add(address, I64(4 * row)), F32)) for row in range(ROWS)]

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        return self.b.call(self.fma, [x, y, z])


@intrinsic
def forward_step(
    typingctx: Any, state: Any, B: Any, f: Any, dy: Any, decay: Any, sums: Any, columns: Any
) -> Any:
    """S = decay S + f B^T; sums += S^T dy: the state after a token, and its gradient of C. f: dt x."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        at_state, at_B, at_f, at_dy, decay_, at_sums, columns_ = arguments
        rows = _Rows(b, at_state, columns_)
        decays, fs, dys = splat(b, decay_), rows.splat_each(at_f), rows.splat_each(at_dy)
        with Loop(b, columns_, 16, []) as loop:
            offset = b.mul(loop.index, I64(4))
            b16, total = rows.load(b.add(at_B, offset)), rows.load(b.add(at_sums, offset))
            for row in range(ROWS):
                place = b.add(rows.starts[row], offset)
                updated = rows.multiply_add(rows.load(place), decays, b.fmul(fs[row], b16))
                rows.store(updated, place)
                total = rows.multiply_add(updated, dys[row], total)
            rows.store(total, b.add(at_sums, offset))
            loop.close([])
        return context.get_dummy_value()

    return types.void(_WORD, _WORD, _WORD, _WORD, _NUMBER, _WORD, _WORD), generate


@intrinsic
def backward_step(
    typingctx: Any,
    grad: Any,
    B: Any,
    C: Any,
    f: Any,
    dy: Any,
    decay: Any,
    sums: Any,
    df: Any,
    columns: Any,
) -> Any:
    """E = decay E + dy C^T; df = E B; sums += E^T f: the gradients of a state, of f = dt x and of B."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        at_grad, at_B, at_C, at_f, at_dy, decay_, at_sums, at_df, columns_ = arguments
        rows = _Rows(b, at_grad, columns_)
        decays, fs, dys = splat(b, decay_), rows.splat_each(at_f), rows.splat_each(at_dy)
        with Loop(b, columns_, 16, [ir.Constant(V16F, [0.0] * 16)] * ROWS) as loop:
            offset = b.mul(loop.index, I64(4))
            b16, c16 = rows.load(b.add(at_B, offset)), rows.load(b.add(at_C, offset))
            total = rows.load(b.add(at_sums, offset))
            dfs = []
            for row, df in enumerate(loop.values):
                place = b.add(rows.starts[row], offset)
                updated = rows.multiply_add(rows.load(place), decays, b.fmul(dys[row], c16))
                rows.store(updated, place)
                dfs.append(rows.multiply_add(updated, b16, df))
                total = rows.multiply_add(updated, fs[row], total)
            rows.store(total, b.add(at_sums, offset))
            loop.close(dfs)
        reduce = function(b, "llvm.vector.reduce.fadd.v16f32", F32, [F32, V16F])
        for row, total in enumerate(loop.results):
            call = b.call(reduce, [F32(0.0), total], fastmath=("reassoc",))
            rows.store(call, b.add(at_df, I64(4 * row)))
        return context.get_dummy_value()

    return types.void(*[_WORD] * 5, _NUMBER, *[_WORD] * 3), generate
