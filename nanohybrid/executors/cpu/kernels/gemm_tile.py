"""The inner loop of every linear: R rows of activations times P panels of 16 outputs, summed over K.

A panel is 16 outputs. Its part of a group of K is a block, stored pair by pair of k:

    bf16  groups of 32    [16][16][2] bfloat16
    int8  groups of 128   16 scales (bf16), then [32][16][4] bytes, code + 128
    int4  groups of 32    16 scales (bf16), then [4][16][4] bytes, code + 8: four k in the low nibbles,
                          the next four in the high nibbles

Four panels make a unit, and the blocks of a panel are contiguous, so a tile of one row reads four streams of
memory side by side. Rows are packed pair by pair too: [K/2][R][2] bfloat16, so a step of the loop reads
contiguous memory from each. For int8 and int4 the packed rows are then quantized to integers (gemm_int8.py,
which also has the loops of these formats).

Each row's sum runs over k in one order for every R and P, so a result does not depend on the rest of the
batch. With AVX512-BF16 a step is one instruction for 32 products, in which sums of pairs round once. On other
processors LLVM lowers two fp32 FMAs to the instructions that there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.executors.cpu.kernels.gemm_int8 import HAS_AVX512_VNNI, IntegerTile
from nanohybrid.ops.numba.llvm import (
    F32,
    I32,
    I64,
    PTR,
    V16F,
    V16I,
    BFloat,
    Loop,
    cpu_has,
    function,
    splat,
    vector,
)

PAIR_BYTES = 64  # of a panel: 16 outputs times two k
HAS_AVX512_BF16 = cpu_has("avx512bf16", "avx512bw", "avx512vl")
V32B = vector(BFloat(), 32)
FORMATS = ("bf16", "int8", "int4")  # the word `format` of a weight is the index here


def make_tiles(
    shapes: Iterable[tuple[str, int, int]],
    bf16_instructions: bool = HAS_AVX512_BF16,
    int8_instructions: bool = HAS_AVX512_VNNI,
    row_stride: int = 0,
) -> Any:
    """The loops for these (format, rows, panels) as one numba intrinsic.

    Its first three arguments select the loop:

        tiles(format index, rows, panels, address of panels, bytes between panels, bytes between groups,
              address of rows, address of out, bytes between out's rows, groups, pairs per group,
              prefetch distance in bytes)

    It writes fp32 [rows, 16 * panels]. The pairs of a group must be a multiple of 4. Rows of int8 and int4
    are as `quantize_rows` writes them. While it computes, memory at the prefetch distance is loaded into the
    L2 cache.

    bf16_instructions, int8_instructions: use AVX512-BF16 and AVX512-VNNI. row_stride (bf16 only): rows are
    not packed but so many bytes apart, and the products are added to what `out` holds, one after another.
    """
    chosen = tuple(shapes)

    @intrinsic
    def tiles(
        typingctx: Any, format: Any, rows: Any, panels: Any, w: Any, w_stride: Any, g_stride: Any, x: Any,
        out: Any, out_stride: Any, groups: Any, pairs: Any, prefetch: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            after = builder.append_basic_block("tiles_end")
            switch = builder.switch(_case(*arguments[:3], builder), after)
            for name, height, wide in chosen:
                block = builder.append_basic_block(f"{name}_{height}_{wide}")
                switch.add_case(I64(_case(FORMATS.index(name), height, wide)), block)
                builder.position_at_end(block)
                if name == "bf16":
                    _Tile(builder, height, wide, bf16_instructions, row_stride).emit(*arguments[3:])
                else:
                    IntegerTile(builder, name, height, wide, int8_instructions).emit(*arguments[3:])
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), generate

    return tiles


def _case(format: Any, rows: Any, panels: Any, builder: ir.IRBuilder | None = None) -> Any:
    """The case of the switch for a tile, as a number; with a builder, the IR that computes it."""
    if builder is None:
        return (format * 16 + rows) * 16 + panels
    return builder.add(builder.mul(builder.add(builder.mul(format, I64(16)), rows), I64(16)), panels)


class _Tile:
    """Emits the IR of the loop for weights in bfloat16."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, panels: int, bf16_instructions: bool, row_stride: int
    ) -> None:
        self.b, self.rows, self.panels = builder, rows, panels
        self.bf16_instructions, self.accumulate = bf16_instructions, row_stride > 0
        self.row_bytes, self.pair_bytes = (row_stride, 4) if row_stride else (4, 4 * rows)

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
        prefetch: Any,
    ) -> None:
        b = self.b
        starts = [b.add(w, b.mul(w_stride, I64(panel))) for panel in range(self.panels)]
        zeros = [ir.Constant(V16F, [0.0] * 16)] * (self.rows * self.panels)
        places = [self._place(out, out_stride, i) for i in range(len(zeros))]
        begun = [b.load(place, typ=V16F, align=4) for place in places] if self.accumulate else zeros
        with Loop(b, groups, 1, begun) as outer:
            offset = b.mul(outer.index, g_stride)
            at = [b.add(start, offset) for start in starts]
            row = b.add(x, b.mul(b.mul(outer.index, pairs), I64(self.pair_bytes)))
            with Loop(b, pairs, 4, outer.values) as inner:
                self._prefetch(at, inner.index, prefetch)
                inner.close(self._four_pairs(at, row, inner.index, inner.values))
            outer.close(inner.results)
        for place, total in zip(places, outer.results, strict=True):
            b.store(total, place, align=4)

    def _place(self, out: Any, out_stride: Any, i: int) -> Any:
        """The pointer to the i-th vector of sums in `out`."""
        b = self.b
        return b.inttoptr(
            b.add(out, b.add(b.mul(out_stride, I64(i // self.panels)), I64(64 * (i % self.panels)))), PTR
        )

    def _prefetch(self, w: list[Any], pair: Any, distance: Any) -> None:
        """Prefetch into the L2 cache what lies `distance` bytes after the next four pairs of each panel."""
        b = self.b
        prefetch = function(b, "llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        for place in w:
            start = b.add(b.add(place, distance), b.mul(pair, I64(PAIR_BYTES)))
            for line in range(4 * PAIR_BYTES // 64):
                b.call(prefetch, [b.inttoptr(b.add(start, I64(64 * line)), PTR), I32(0), I32(2), I32(1)])

    def _four_pairs(self, w: list[Any], x: Any, pair: Any, sums: list[Any]) -> list[Any]:
        """The sums after four more pairs of k, of all rows and panels."""
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
        """A row's pair of k in all lanes: bfloat16 pairs, or (even k, odd k) in fp32."""
        b = self.b
        word = b.load(b.inttoptr(address, PTR), typ=I32, align=4)
        if self.bf16_instructions:
            return b.bitcast(splat(b, word), V32B)
        low, high = b.shl(word, I32(16)), b.and_(word, I32(0xFFFF0000))
        return splat(b, b.bitcast(low, F32)), splat(b, b.bitcast(high, F32))

    def _add_products(self, total: Any, w: Any, x: Any) -> Any:
        """total + the two products of a pair, in each lane."""
        b = self.b
        if self.bf16_instructions:
            return b.call(
                function(b, "llvm.x86.avx512bf16.dpbf16ps.512", V16F, [V16F, V32B, V32B]), [total, w, x]
            )
        fma = function(b, "llvm.fma.v16f32", V16F, [V16F] * 3)
        return b.call(fma, [w[1], x[1], b.call(fma, [w[0], x[0], total])])

    def _weights(self, start: Any, pair: Any) -> Any:
        """16 outputs' weights of a pair of k: bfloat16 pairs, or (even k, odd k) in fp32."""
        b = self.b
        loaded = b.load(b.inttoptr(b.add(start, b.mul(pair, I64(PAIR_BYTES))), PTR), typ=V16I, align=32)
        return b.bitcast(loaded, V32B) if self.bf16_instructions else self._unpack(loaded)

    def _unpack(self, loaded: Any) -> tuple[Any, Any]:
        """Words of two bfloat16 -> (low halves, high halves) in fp32."""
        b = self.b
        low = b.shl(loaded, ir.Constant(V16I, [16] * 16))
        high = b.and_(loaded, ir.Constant(V16I, [0xFFFF0000] * 16))
        return b.bitcast(low, V16F), b.bitcast(high, V16F)
