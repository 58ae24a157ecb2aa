"""The inner loop of int8 and int4 weights: products of integers, summed exactly, with one scale of the weight and one of the row a group.

A row enters as bfloat16 and is made, group by group, 16-bit integers of a common scale: q = round(x / s), |q| <= MOST, where
s = (largest |x|) / MOST (less for groups of more than 512, so that 32 bits hold their sums). Their high and low bytes go apart,
q = 256 high + low, so that an instruction multiplies 64 bytes of codes (AVX512-VNNI), and nothing of a weight has to be unpacked
to a float, which is what bounded these loops before (docs/log.md). Finer than bfloat16 for whatever is within 2^-7 of a group's
largest.

Codes are stored without a sign, u = code + OFFSET; with it, sums begin at -OFFSET times the sum of the row's q. Integers have no order,
so that every way to sum a group gives the same bits. A group of a row, for R rows:

    R scales (fp32), R first sums (int32), then [K/4][R] words of four high bytes, then as many of low ones
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.jit import called, inlined
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
    function,
    has,
    spread,
    vector,
)

MOST = 127 * 256 + 127  # so that the high byte is at most 127
OFFSET = {"int8": 128, "int4": 8}
SCALES = 32  # bytes before a group of a panel: 16 scales in bfloat16
QUADS = {
    "int8": 1,
    "int4": 2,
}  # in a line of a panel: 64 bytes, for each of 16 outputs four codes, or eight: the low nibbles' four first
BYTED = has("avx512vnni", "avx512bw", "avx512vl")
NEAR_LINES = (
    64  # of a panel that go by together where they go by twice: with their rows they stay in the first level
)
REGISTERS = 24  # sums of both bytes are kept side by side where they are no more
ROUNDER = (
    12582912.0  # 1.5 * 2^23: added to a number below 2^22, it leaves the nearest integer in the lowest bits
)
V64B = vector(I8, 64)


class IntegerTile:
    """Writes the loop's instructions, as tile.py's `_Tile`."""

    def __init__(self, builder: ir.IRBuilder, form: str, rows: int, panels: int, byted: bool) -> None:
        self.b, self.form, self.rows, self.panels, self.byted = builder, form, rows, panels, byted
        self.quads = QUADS[form]

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
        b, count = self.b, self.rows * self.panels
        starts = [b.add(w, b.mul(w_stride, I64(panel))) for panel in range(self.panels)]
        bytes_x = b.mul(b.add(pairs, I64(2)), I64(4 * self.rows))
        lines, high = (
            b.sdiv(pairs, I64(2 * self.quads)),
            b.mul(pairs, I64(2 * self.rows)),
        )  # of a panel; bytes of all high bytes
        with Loop(b, groups, 1, [ir.Constant(V16F, [0.0] * 16)] * count) as outer:
            offset = b.mul(outer.index, g_stride)
            at = [b.add(start, offset) for start in starts]
            head = b.add(x, b.mul(outer.index, bytes_x))
            first, row = [b.add(place, I64(SCALES)) for place in at], b.add(head, I64(8 * self.rows))
            begun = [
                self._all(b.add(head, I64(4 * (self.rows + i // self.panels))), I32) for i in range(count)
            ]
            sums = self._group(first, row, high, lines, ahead, begun)
            scales = [self._scales(place) for place in at]
            fma = function(b, "llvm.fma.v16f32", V16F, [V16F] * 3)
            totals = []
            for i, (part, total) in enumerate(zip(sums, outer.values, strict=True)):
                both = b.fmul(
                    scales[i % self.panels], self._all(b.add(head, I64(4 * (i // self.panels))), F32)
                )
                totals.append(b.call(fma, [b.sitofp(part, V16F), both, total]))
            outer.close(totals)
        for i, total in enumerate(outer.results):
            place = b.add(out, b.add(b.mul(out_stride, I64(i // self.panels)), I64(64 * (i % self.panels))))
            b.store(total, b.inttoptr(place, PTR), align=4)

    def _group(self, w: list[Any], x: Any, high: Any, lines: Any, ahead: Any, begun: list[Any]) -> list[Any]:
        """The integer sums of a group: 256 times those of the high bytes, and those of the low ones."""
        b, zero, eight = self.b, ir.Constant(V16I, [0] * 16), ir.Constant(V16I, [8] * 16)
        low = b.add(x, high)
        if 2 * len(begun) <= REGISTERS:
            with Loop(b, lines, 1, [zero] * len(begun) + begun) as loop:
                self._ask(w, loop.index, ahead)
                closing = self._line(w, [x, low], loop.index, loop.values)
                loop.close(closing)
            tops, lows = loop.results[: len(begun)], loop.results[len(begun) :]
            return [b.add(b.shl(top, eight), bottom) for top, bottom in zip(tops, lows, strict=True)]
        if self.form == "int4":  # its groups are short
            return self._twice(w, x, low, I64(0), lines, ahead, begun)
        with Loop(b, lines, NEAR_LINES, begun) as part:
            left = b.sub(lines, part.index)
            here = b.select(b.icmp_signed("<", left, I64(NEAR_LINES)), left, I64(NEAR_LINES))
            part.close(self._twice(w, x, low, part.index, here, ahead, part.values))
        return part.results

    def _twice(
        self, w: list[Any], x: Any, low: Any, start: Any, lines: Any, ahead: Any, begun: list[Any]
    ) -> list[Any]:
        """The sums after these lines, which pass by twice, the second time in the first level."""
        b, zero, eight = self.b, ir.Constant(V16I, [0] * 16), ir.Constant(V16I, [8] * 16)
        with Loop(b, lines, 1, [zero] * len(begun)) as loop:
            line = b.add(start, loop.index)
            self._ask(w, line, ahead)
            loop.close(self._line(w, [x], line, loop.values))
        raised = [b.add(b.shl(top, eight), before) for top, before in zip(loop.results, begun, strict=True)]
        with Loop(b, lines, 1, raised) as loop:
            loop.close(self._line(w, [low], b.add(start, loop.index), loop.values))
        return loop.results

    def _line(self, w: list[Any], planes: list[Any], line: Any, sums: list[Any]) -> list[Any]:
        """64 bytes of every panel, times as much of every row; the sums of each plane after one another."""
        b, sums, count = self.b, list(sums), self.rows * self.panels
        codes = [self._codes(b.add(place, b.mul(line, I64(64)))) for place in w]
        for quad in range(self.quads):
            for plane, start in enumerate(planes):
                for row in range(self.rows):
                    at = b.add(
                        b.mul(b.add(b.mul(line, I64(self.quads)), I64(quad)), I64(4 * self.rows)),
                        I64(4 * row),
                    )
                    four = self._all(b.add(start, at), I32)
                    for panel in range(self.panels):
                        i = plane * count + row * self.panels + panel
                        sums[i] = self._add_products(sums[i], codes[panel][quad], four)
        return sums

    def _codes(self, place: Any) -> list[Any]:
        """Bytes without a sign, four of each output: of one line, or of its low and its high nibbles."""
        b = self.b
        loaded = b.load(b.inttoptr(place, PTR), typ=V16I, align=32)
        if self.form == "int8":
            return [loaded]
        mask = ir.Constant(V16I, [0x0F0F0F0F] * 16)
        return [b.and_(loaded, mask), b.and_(b.lshr(loaded, ir.Constant(V16I, [4] * 16)), mask)]

    def _add_products(self, total: Any, w: Any, x: Any) -> Any:
        """total + four products of a byte without and one with a sign, in each lane."""
        b = self.b
        if self.byted:
            kind = V64B if binding.llvm_version_info[0] >= 22 else V16I
            add = function(b, "llvm.x86.avx512.vpdpbusd.512", V16I, [V16I, kind, kind])
            return b.call(add, [total, b.bitcast(w, kind), b.bitcast(x, kind)])
        for byte in range(4):
            one = b.and_(b.lshr(w, ir.Constant(V16I, [8 * byte] * 16)), ir.Constant(V16I, [255] * 16))
            other = b.ashr(b.shl(x, ir.Constant(V16I, [24 - 8 * byte] * 16)), ir.Constant(V16I, [24] * 16))
            total = b.add(total, b.mul(one, other))
        return total

    def _ask(self, w: list[Any], line: Any, ahead: Any) -> None:
        """Prefetch what lies `ahead` bytes from this line of each panel, into the second level."""
        b = self.b
        prefetch = function(b, "llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        for place in w:
            b.call(
                prefetch,
                [b.inttoptr(b.add(b.add(place, ahead), b.mul(line, I64(64))), PTR), I32(0), I32(2), I32(1)],
            )

    def _all(self, place: Any, kind: ir.Type) -> Any:
        """A word in all lanes."""
        return spread(self.b, self.b.load(self.b.inttoptr(place, PTR), typ=kind, align=4))

    def _scales(self, place: Any) -> Any:
        b = self.b
        halves = b.load(b.inttoptr(place, PTR), typ=vector(I16), align=32)
        return b.bitcast(b.shl(b.zext(halves, V16I), ir.Constant(V16I, [16] * 16)), V16F)


def _make(rows: int, at_once: int) -> Any:
    """One group of `rows` packed rows made integers, `at_once` pairs at a time."""

    @intrinsic
    def fix(typingctx: Any, x: Any, out: Any, pairs: Any, offset: Any, most: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _fix(builder, rows, at_once, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return fix


def _fix(
    b: ir.IRBuilder, rows: int, at_once: int, x: Any, out: Any, pairs: Any, offset: Any, most: Any
) -> None:
    alone = rows > 8  # a pair of all rows is a vector; of fewer rows several pairs are
    lanes = rows if alone else at_once * rows
    words, halves, numbers = vector(I32, lanes), vector(I16, 2 * lanes), vector(F32, lanes)

    def load(pair: Any) -> list[Any]:
        places = [b.add(x, b.mul(b.add(pair, I64(i)), I64(4 * rows))) for i in range(at_once if alone else 1)]
        return [b.load(b.inttoptr(place, PTR), typ=words, align=4) for place in places]

    def take(value: Any, places: list[int]) -> Any:
        return b.shuffle_vector(value, value, ir.Constant(vector(I32, len(places)), places))

    def every(kind: ir.VectorType, value: Any) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def in_all(value: Any, kind: ir.VectorType) -> Any:
        one = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return b.shuffle_vector(one, one, ir.Constant(vector(I32, kind.count), [0] * kind.count))

    # 1. the largest |x| of each row, by its bits: what is no number is larger than all that are
    with Loop(b, pairs, at_once, [every(halves, 0)]) as loop:
        found = loop.values[0]
        for word in load(loop.index):
            bits = b.bitcast(b.and_(word, every(words, 0x7FFF7FFF)), halves)
            found = b.select(b.icmp_unsigned(">", bits, found), bits, found)
        loop.close([found])
    word = b.bitcast(loop.results[0], words)
    low, high = b.and_(word, every(words, 0xFFFF)), b.lshr(word, every(words, 16))
    largest = b.select(b.icmp_unsigned(">", low, high), low, high)
    width = lanes
    while width > rows:
        width //= 2
        one, other = take(largest, list(range(width))), take(largest, list(range(width, 2 * width)))
        largest = b.select(b.icmp_unsigned(">", one, other), one, other)
    few_words, few = vector(I32, rows), vector(F32, rows)
    peak = b.bitcast(b.shl(largest, every(few_words, 16)), few)
    limit = in_all(b.sitofp(most, F32), few)
    inverse = b.select(b.fcmp_ordered("==", peak, every(few, 0.0)), every(few, 0.0), b.fdiv(limit, peak))
    scale = b.fdiv(peak, limit)
    b.store(scale, b.inttoptr(out, PTR), align=4)
    inverses = b.shuffle_vector(
        inverse, inverse, ir.Constant(vector(I32, lanes), [lane % rows for lane in range(lanes)])
    )

    # 2. round, and take the bytes apart
    def rounded(value: Any) -> Any:
        moved = b.fadd(b.fmul(b.bitcast(value, numbers), inverses), every(numbers, ROUNDER))
        return b.sub(b.bitcast(moved, words), every(words, 0x4B400000))

    half = words if alone else vector(I32, lanes // 2)
    evens = [pair * rows + row for pair in range(0, at_once, 2) for row in range(rows)]
    odds = [place + rows for place in evens]
    tops = b.add(out, I64(8 * rows))
    lows = b.add(tops, b.mul(pairs, I64(2 * rows)))

    def put(values: list[tuple[Any, Any]], place: Any) -> None:
        """Words of four bytes, of the low bytes of (k, k + 1) pairs."""
        if not alone:
            values = [
                (take(first, places), take(second, places))
                for first, second in values
                for places in (evens, odds)
            ]
        for i in range(0, len(values), 2):
            total = b.and_(values[i][0], every(half, 255))
            for byte, part in enumerate((values[i][1], *values[i + 1]), start=1):
                total = b.or_(total, b.shl(b.and_(part, every(half, 255)), every(half, 8 * byte)))
            b.store(total, b.inttoptr(b.add(place, I64(2 * rows * i)), PTR), align=4)

    with Loop(b, pairs, at_once, [every(words, 0)]) as loop:
        both = [
            (b.shl(word, every(words, 16)), b.and_(word, every(words, 0xFFFF0000)))
            for word in load(loop.index)
        ]
        values = [(rounded(first), rounded(second)) for first, second in both]
        place, total = b.mul(loop.index, I64(2 * rows)), loop.values[0]
        put(values, b.add(lows, place))
        raise_ = lambda value: b.ashr(b.add(value, every(words, 128)), every(words, 8))  # noqa: E731
        put([(raise_(first), raise_(second)) for first, second in values], b.add(tops, place))
        for first, second in values:
            total = b.add(total, b.add(first, second))
        loop.close([total])

    # 3. what the sums begin with, since codes are stored without a sign
    total, width = loop.results[0], lanes
    while width > rows:
        width //= 2
        total = b.add(take(total, list(range(width))), take(total, list(range(width, 2 * width))))
    times = in_all(b.trunc(b.sub(I64(0), offset), I32), few_words)
    b.store(b.mul(total, times), b.inttoptr(b.add(out, I64(4 * rows)), PTR), align=4)


_one, _one_long, _two, _four, _eight, _twelve = (
    _make(1, 4),
    _make(1, 16),
    _make(2, 4),
    _make(4, 4),
    _make(8, 4),
    _make(12, 4),
)


@inlined
def row_bytes(groups, pairs):
    """Of one row of a tile, made integers."""
    return groups * (pairs + 2) * 4


@called
def fix_rows(x, first, last, height, groups, pairs, offset, out):
    """Tiles `first` to `last` of packed bfloat16 rows at `x`, as integers at `out`."""
    step, most = (pairs + 2) * 4 * height, min(MOST, (1 << 31) // (256 * pairs))
    for group in range(first * groups, last * groups):
        source, target = x + group * pairs * 4 * height, out + group * step
        if height == 1:
            if pairs % 16 == 0:
                _one_long(source, target, pairs, offset, most)
            else:
                _one(source, target, pairs, offset, most)
        elif height == 2:
            _two(source, target, pairs, offset, most)
        elif height == 4:
            _four(source, target, pairs, offset, most)
        elif height == 8:
            _eight(source, target, pairs, offset, most)
        else:
            _twelve(source, target, pairs, offset, most)
