"""The one inner loop of every linear layer: R rows of activations times P panels of 16 outputs, summed in fp32 over all of K.

A panel is 16 outputs; what it holds of a group of K is a block, pair by pair of k:

    bf16  groups of 32    [16][16][2] bfloat16
    int8  groups of 128   16 scales (bf16), then [32][16][4] bytes, code + 128
    int4  groups of 32    16 scales (bf16), then [4][16][4] bytes, code + 8, four k in the low and the next four in the high nibbles

Four panels make a unit, and a panel's blocks lie one after the other: a tile of one row reads four runs of memory side by side.
Rows are packed pair by pair too: [K/2][R][2] bfloat16, so that a step of the loop reads one run of memory from each. For int8 and
int4 they are made integers once more (integers.py, which has their loops).

Each row's sum runs over k in one order whatever R and P are: a result does not depend on what shares the batch. With
AVX512-BF16 a step is one instruction for 32 products (sums of pairs round once); elsewhere LLVM lowers two fp32 FMAs to what
the processor has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.executors.cpu.kernels.gemm_int8 import BYTED, IntegerTile
from nanohybrid.ops.numba.llvm import (
    F32,
    I32,
    I64,
    PTR,
    V16F,
    V16I,
    BFloat,
    Loop,
    function,
    has,
    spread,
    vector,
)

PAIR_BYTES = 64  # of 16 outputs and two k
PAIRED = has("avx512bf16", "avx512bw", "avx512vl")
V32B = vector(BFloat(), 32)
FORMS = ("bf16", "int8", "int4")  # a weight's form is its index here


def make_tiles(
    shapes: Iterable[tuple[str, int, int]], paired: bool = PAIRED, byted: bool = BYTED, apart: int = 0
) -> Any:
    """The loops for these (form, rows, panels) as one intrinsic of numba, which takes the one that its first arguments name:

    tiles(form's index, rows, panels, address of panels, bytes between panels, bytes between groups, rows' address, out's address,
    bytes between out's rows, groups, pairs a group, bytes ahead) writes fp32 [rows, 16 * panels]. Pairs of a group must be a
    multiple of 4. Rows of int8 and int4 are those of integers.py's `fix_rows`. What lies so many bytes ahead is asked for on the
    way, so that memory works while sums are made. `paired`, `byted`: with AVX512-BF16's and AVX512-VNNI's instructions. `apart`
    (bf16 only): rows are not packed but lie so many bytes apart, and sums go on from what `out` holds, product by product.
    """
    chosen = tuple(shapes)

    @intrinsic
    def tiles(
        typingctx: Any, form: Any, rows: Any, panels: Any,
        w: Any, w_stride: Any, g_stride: Any, x: Any, out: Any, out_stride: Any, groups: Any, pairs: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            after = builder.append_basic_block("tiled")
            switch = builder.switch(_number(*arguments[:3], builder), after)
            for name, height, wide in chosen:
                block = builder.append_basic_block(f"{name}_{height}_{wide}")
                switch.add_case(I64(_number(FORMS.index(name), height, wide)), block)
                builder.position_at_end(block)
                if name == "bf16":
                    _Tile(builder, height, wide, paired, apart).emit(*arguments[3:])
                else:
                    IntegerTile(builder, name, height, wide, byted).emit(*arguments[3:])
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), generate

    return tiles


def _number(form: Any, rows: Any, panels: Any, builder: ir.IRBuilder | None = None) -> Any:
    """One number for a tile; with a builder, the instructions that make it."""
    if builder is None:
        return (form * 16 + rows) * 16 + panels
    return builder.add(builder.mul(builder.add(builder.mul(form, I64(16)), rows), I64(16)), panels)


class _Tile:
    """Writes the loop's instructions for weights in bfloat16."""

    def __init__(self, builder: ir.IRBuilder, rows: int, panels: int, paired: bool, apart: int) -> None:
        self.b, self.rows, self.panels, self.paired, self.apart = builder, rows, panels, paired, apart
        self.row_bytes, self.pair_bytes = (apart, 4) if apart else (4, 4 * rows)

    def emit(
        self,
        w: Any,
        w_stride: Any,
        g_stride: Any,
        x: Any,
        out: Any,
        out_stride: Any,
        groups: Any,
        pairs: Any,
        ahead: Any,
    ) -> None:
        b = self.b
        starts = [b.add(w, b.mul(w_stride, I64(panel))) for panel in range(self.panels)]
        zeros = [ir.Constant(V16F, [0.0] * 16)] * (self.rows * self.panels)
        places = [self._place(out, out_stride, i) for i in range(len(zeros))]
        begun = [b.load(place, typ=V16F, align=4) for place in places] if self.apart else zeros
        with Loop(b, groups, 1, begun) as outer:
            offset = b.mul(outer.index, g_stride)
            at = [b.add(start, offset) for start in starts]
            row = b.add(x, b.mul(b.mul(outer.index, pairs), I64(self.pair_bytes)))
            with Loop(b, pairs, 4, outer.values) as inner:
                self._ask(at, inner.index, ahead)
                inner.close(self._four_pairs(at, row, inner.index, inner.values))
            outer.close(inner.results)
        for place, total in zip(places, outer.results, strict=True):
            b.store(total, place, align=4)

    def _place(self, out: Any, out_stride: Any, i: int) -> Any:
        """Where the i-th vector of sums belongs."""
        b = self.b
        return b.inttoptr(
            b.add(out, b.add(b.mul(out_stride, I64(i // self.panels)), I64(64 * (i % self.panels)))), PTR
        )

    def _ask(self, w: list[Any], pair: Any, ahead: Any) -> None:
        """Prefetch the lines that the next four pairs' place will hold `ahead` bytes from here, into the second level."""
        b = self.b
        prefetch = function(b, "llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        for place in w:
            start = b.add(b.add(place, ahead), b.mul(pair, I64(PAIR_BYTES)))
            for line in range(4 * PAIR_BYTES // 64):
                b.call(prefetch, [b.inttoptr(b.add(start, I64(64 * line)), PTR), I32(0), I32(2), I32(1)])

    def _four_pairs(self, w: list[Any], x: Any, pair: Any, sums: list[Any]) -> list[Any]:
        """Four pairs of k, of all rows and panels."""
        sums = list(sums)
        for each in range(4):
            at = self.b.add(pair, I64(each))
            weights = [self._weights(place, at) for place in w]
            for row in range(self.rows):
                place = self.b.add(x, self.b.mul(at, I64(self.pair_bytes)))
                activations = self._activations(self.b.add(place, I64(self.row_bytes * row)))
                for panel in range(self.panels):
                    i = row * self.panels + panel
                    sums[i] = self._add_products(sums[i], weights[panel], activations)
        return sums

    def _activations(self, address: Any) -> Any:
        """A row's pair of k, in all lanes."""
        b = self.b
        word = b.load(b.inttoptr(address, PTR), typ=I32, align=4)
        if self.paired:
            return b.bitcast(spread(b, word), V32B)
        low, high = b.shl(word, I32(16)), b.and_(word, I32(0xFFFF0000))
        return spread(b, b.bitcast(low, F32)), spread(b, b.bitcast(high, F32))

    def _add_products(self, total: Any, w: Any, x: Any) -> Any:
        b = self.b
        if self.paired:
            return b.call(
                function(b, "llvm.x86.avx512bf16.dpbf16ps.512", V16F, [V16F, V32B, V32B]), [total, w, x]
            )
        fma = function(b, "llvm.fma.v16f32", V16F, [V16F] * 3)
        return b.call(fma, [w[1], x[1], b.call(fma, [w[0], x[0], total])])

    def _weights(self, start: Any, pair: Any) -> Any:
        """The operands of a pair: bfloat16 pairs, or (even k, odd k) in fp32."""
        b = self.b
        loaded = b.load(b.inttoptr(b.add(start, b.mul(pair, I64(PAIR_BYTES))), PTR), typ=V16I, align=32)
        return b.bitcast(loaded, V32B) if self.paired else self._halves_of_words(loaded)

    def _halves_of_words(self, loaded: Any) -> tuple[Any, Any]:
        b = self.b
        low = b.shl(loaded, ir.Constant(V16I, [16] * 16))
        high = b.and_(loaded, ir.Constant(V16I, [0xFFFF0000] * 16))
        return b.bitcast(low, V16F), b.bitcast(high, V16F)
