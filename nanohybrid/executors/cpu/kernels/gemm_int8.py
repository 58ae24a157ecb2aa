"""The inner loop of int8 and int4 weights: exact integer sums of products, scaled once per group.

The rows are quantized to 16-bit integers q = 256 high + low, with the high and low bytes apart
(quantize_rows.py). So one AVX512-VNNI instruction multiplies 64 bytes of codes, and no weight is unpacked to
floating point, which had been the bottleneck (docs/log.md).

Weights are stored unsigned, u = code + CODE_OFFSET, so the sums begin at -CODE_OFFSET times the sum of the
row's q. Integer sums have no rounding: every order of summation gives the same bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir

from nanohybrid.ops.numba.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    PTR,
    V16F,
    V16I,
    Loop,
    cpu_has,
    function,
    splat,
    vector,
)

CODE_OFFSET = {"int8": 128, "int4": 8}
SCALE_BYTES = 32  # before a group of a panel: 16 scales in bfloat16
# Quads in a 64-byte line of a panel: four codes of each of 16 outputs, or eight, of which the low nibbles
# hold the first four.
QUADS = {"int8": 1, "int4": 2}
HAS_AVX512_VNNI = cpu_has("avx512vnni", "avx512bw", "avx512vl")
L1_LINES = 64  # of a panel that are read twice in a row: with their rows they stay in the L1 cache
MAX_ACCUMULATORS = 24  # registers; up to so many sums, those of both bytes are computed side by side
V64B = vector(I8, 64)


class IntegerTile:
    """Emits the IR of the loop, as gemm_tile.py's `_Tile` does for bfloat16."""

    def __init__(
        self, builder: ir.IRBuilder, format: str, rows: int, panels: int, int8_instructions: bool
    ) -> None:
        self.b, self.format, self.rows, self.panels = builder, format, rows, panels
        self.int8_instructions = int8_instructions
        self.quads = QUADS[format]

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
        b, count = self.b, self.rows * self.panels
        starts = [b.add(w, b.mul(w_stride, I64(panel))) for panel in range(self.panels)]
        bytes_x = b.mul(b.add(pairs, I64(2)), I64(4 * self.rows))
        lines = b.sdiv(pairs, I64(2 * self.quads))  # of a group of a panel
        high_bytes = b.mul(pairs, I64(2 * self.rows))  # of a group of the rows
        with Loop(b, groups, 1, [ir.Constant(V16F, [0.0] * 16)] * count) as outer:
            offset = b.mul(outer.index, g_stride)
            at = [b.add(start, offset) for start in starts]
            head = b.add(x, b.mul(outer.index, bytes_x))
            first, row = [b.add(place, I64(SCALE_BYTES)) for place in at], b.add(head, I64(8 * self.rows))
            initial = [
                self._splat_load(b.add(head, I64(4 * (self.rows + i // self.panels))), I32)
                for i in range(count)
            ]
            sums = self._group(first, row, high_bytes, lines, prefetch, initial)
            scales = [self._scales(place) for place in at]
            fma = function(b, "llvm.fma.v16f32", V16F, [V16F] * 3)
            totals = []
            for i, (part, total) in enumerate(zip(sums, outer.values, strict=True)):
                both = b.fmul(
                    scales[i % self.panels], self._splat_load(b.add(head, I64(4 * (i // self.panels))), F32)
                )
                totals.append(b.call(fma, [b.sitofp(part, V16F), both, total]))
            outer.close(totals)
        for i, total in enumerate(outer.results):
            place = b.add(out, b.add(b.mul(out_stride, I64(i // self.panels)), I64(64 * (i % self.panels))))
            b.store(total, b.inttoptr(place, PTR), align=4)

    def _group(
        self, w: list[Any], x: Any, high_bytes: Any, lines: Any, prefetch: Any, initial: list[Any]
    ) -> list[Any]:
        """The integer sums of a group: 256 times those of the high bytes, plus those of the low bytes."""
        b, zero, eight = self.b, ir.Constant(V16I, [0] * 16), ir.Constant(V16I, [8] * 16)
        low = b.add(x, high_bytes)
        if 2 * len(initial) <= MAX_ACCUMULATORS:
            with Loop(b, lines, 1, [zero] * len(initial) + initial) as loop:
                self._prefetch(w, loop.index, prefetch)
                closing = self._line(w, [x, low], loop.index, loop.values)
                loop.close(closing)
            tops, lows = loop.results[: len(initial)], loop.results[len(initial) :]
            return [b.add(b.shl(top, eight), bottom) for top, bottom in zip(tops, lows, strict=True)]
        if self.format == "int4":  # its groups are short
            return self._two_passes(w, x, low, I64(0), lines, prefetch, initial)
        with Loop(b, lines, L1_LINES, initial) as part:
            left = b.sub(lines, part.index)
            count = b.select(b.icmp_signed("<", left, I64(L1_LINES)), left, I64(L1_LINES))
            part.close(self._two_passes(w, x, low, part.index, count, prefetch, part.values))
        return part.results

    def _two_passes(
        self, w: list[Any], x: Any, low: Any, start: Any, lines: Any, prefetch: Any, initial: list[Any]
    ) -> list[Any]:
        """The sums after these lines: one pass for the high bytes, one from the L1 cache for the low
        bytes.
        """
        b, zero, eight = self.b, ir.Constant(V16I, [0] * 16), ir.Constant(V16I, [8] * 16)
        with Loop(b, lines, 1, [zero] * len(initial)) as loop:
            line = b.add(start, loop.index)
            self._prefetch(w, line, prefetch)
            loop.close(self._line(w, [x], line, loop.values))
        raised = [b.add(b.shl(top, eight), before) for top, before in zip(loop.results, initial, strict=True)]
        with Loop(b, lines, 1, raised) as loop:
            loop.close(self._line(w, [low], b.add(start, loop.index), loop.values))
        return loop.results

    def _line(self, w: list[Any], planes: list[Any], line: Any, sums: list[Any]) -> list[Any]:
        """The sums after one 64-byte line of every panel. planes: high or low bytes of the rows, or both."""
        b, sums, count = self.b, list(sums), self.rows * self.panels
        codes = [self._codes(b.add(place, b.mul(line, I64(64)))) for place in w]
        for quad in range(self.quads):
            for plane, start in enumerate(planes):
                for row in range(self.rows):
                    at = b.add(
                        b.mul(b.add(b.mul(line, I64(self.quads)), I64(quad)), I64(4 * self.rows)),
                        I64(4 * row),
                    )
                    four = self._splat_load(b.add(start, at), I32)
                    for panel in range(self.panels):
                        i = plane * count + row * self.panels + panel
                        sums[i] = self._add_products(sums[i], codes[panel][quad], four)
        return sums

    def _codes(self, place: Any) -> list[Any]:
        """Unsigned bytes, four for each output: a line of int8, or the low and high nibbles of a line of
        int4.
        """
        b = self.b
        loaded = b.load(b.inttoptr(place, PTR), typ=V16I, align=32)
        if self.format == "int8":
            return [loaded]
        mask = ir.Constant(V16I, [0x0F0F0F0F] * 16)
        return [b.and_(loaded, mask), b.and_(b.lshr(loaded, ir.Constant(V16I, [4] * 16)), mask)]

    def _add_products(self, total: Any, w: Any, x: Any) -> Any:
        """total + four products of an unsigned and a signed byte, in each lane."""
        b = self.b
        if self.int8_instructions:
            kind = V64B if binding.llvm_version_info[0] >= 22 else V16I
            add = function(b, "llvm.x86.avx512.vpdpbusd.512", V16I, [V16I, kind, kind])
            return b.call(add, [total, b.bitcast(w, kind), b.bitcast(x, kind)])
        for byte in range(4):
            one = b.and_(b.lshr(w, ir.Constant(V16I, [8 * byte] * 16)), ir.Constant(V16I, [255] * 16))
            other = b.ashr(b.shl(x, ir.Constant(V16I, [24 - 8 * byte] * 16)), ir.Constant(V16I, [24] * 16))
            total = b.add(total, b.mul(one, other))
        return total

    def _prefetch(self, w: list[Any], line: Any, distance: Any) -> None:
        """Prefetch into the L2 cache what lies `distance` bytes after this line of each panel."""
        b = self.b
        prefetch = function(b, "llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        for place in w:
            address = b.add(b.add(place, distance), b.mul(line, I64(64)))
            b.call(prefetch, [b.inttoptr(address, PTR), I32(0), I32(2), I32(1)])

    def _splat_load(self, place: Any, kind: ir.Type) -> Any:
        """A word of memory in all lanes."""
        return splat(self.b, self.b.load(self.b.inttoptr(place, PTR), typ=kind, align=4))

    def _scales(self, place: Any) -> Any:
        """16 scales, bfloat16 in memory, in fp32."""
        b = self.b
        halves = b.load(b.inttoptr(place, PTR), typ=vector(I16), align=32)
        return b.bitcast(b.shl(b.zext(halves, V16I), ir.Constant(V16I, [16] * 16)), V16F)
