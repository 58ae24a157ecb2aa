"""Quantization of activations to 16-bit integers, for the tiles of int8 and int4 weights (gemm_int8.py).

Rows are quantized group by group: q = round(x / s), |q| <= MAX_CODE, with s = (largest |x|) / MAX_CODE. (For
groups of more than 512 the limit is lower, so that 32 bits hold the sums of products.) The result is more
precise than bfloat16 for every value within 2^-7 of its group's largest. The high and low bytes of q = 256
high + low are stored apart. A group, for R rows:

    R scales (fp32), R initial sums (int32),
    then [K/4][R] words of four high bytes, then as many words of four low bytes

The initial sums make up for the weights' codes, which are stored unsigned: -offset times the sum of the row's
q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.jit import inline, noinline
from nanohybrid.ops.numba.llvm import F32, I16, I32, I64, PTR, Loop, vector

MAX_CODE = 127 * 256 + 127  # so the high byte is at most 127
ROUNDER = 12582912.0  # 1.5 * 2^23: a number below 2^22 plus this has its nearest integer in the low bits


class _RowQuantizer:
    """Emits the IR that quantizes one group of `rows` packed rows, `at_once` pairs of k at a time."""

    def __init__(self, builder: ir.IRBuilder, rows: int, at_once: int, x: Any, out: Any, pairs: Any) -> None:
        self.b, self.rows, self.at_once, self.x, self.out, self.pairs = builder, rows, at_once, x, out, pairs
        self.one_pair = (
            rows > 8
        )  # a vector holds one pair of all rows; with fewer rows it holds several pairs
        self.lanes = rows if self.one_pair else at_once * rows
        self.words, self.row_words = vector(I32, self.lanes), vector(I32, rows)
        self.numbers, self.row_numbers = vector(F32, self.lanes), vector(F32, rows)

    def emit(self, offset: Any, max_code: Any) -> None:
        """Write scales, initial sums, high bytes and low bytes to `out`."""
        b, inverses = self.b, self._store_scales(max_code)
        total = self._store_codes(inverses)
        total = self._reduce(total, b.add)
        times = self._splat(b.trunc(b.sub(I64(0), offset), I32), self.row_words)
        b.store(b.mul(total, times), b.inttoptr(b.add(self.out, I64(4 * self.rows)), PTR), align=4)

    def _store_scales(self, max_code: Any) -> Any:
        """Each row's scale; their inverses, repeated for all lanes."""
        b, words, rows = self.b, self.words, self.rows
        halves = vector(I16, 2 * self.lanes)
        # The largest |x| of each row, by its bits: those of a NaN are larger than those of every number.
        with Loop(b, self.pairs, self.at_once, [_constant(halves, 0)]) as loop:
            largest_bits = loop.values[0]
            for word in self._load(loop.index):
                bits = b.bitcast(b.and_(word, _constant(words, 0x7FFF7FFF)), halves)
                largest_bits = b.select(b.icmp_unsigned(">", bits, largest_bits), bits, largest_bits)
            loop.close([largest_bits])
        word = b.bitcast(loop.results[0], words)
        low, high = b.and_(word, _constant(words, 0xFFFF)), b.lshr(word, _constant(words, 16))
        largest = b.select(b.icmp_unsigned(">", low, high), low, high)
        largest = self._reduce(largest, lambda x, y: b.select(b.icmp_unsigned(">", x, y), x, y))
        peak = b.bitcast(b.shl(largest, _constant(self.row_words, 16)), self.row_numbers)
        limit, zero = self._splat(b.sitofp(max_code, F32), self.row_numbers), _constant(self.row_numbers, 0.0)
        inverse = b.select(b.fcmp_ordered("==", peak, zero), zero, b.fdiv(limit, peak))
        b.store(b.fdiv(peak, limit), b.inttoptr(self.out, PTR), align=4)
        repeated = ir.Constant(vector(I32, self.lanes), [lane % rows for lane in range(self.lanes)])
        return b.shuffle_vector(inverse, inverse, repeated)

    def _store_codes(self, inverses: Any) -> Any:
        """High and low bytes of all codes; the codes' sums, lane by lane."""
        b, words, rows = self.b, self.words, self.rows

        def rounded(value: Any) -> Any:
            scaled = b.fmul(b.bitcast(value, self.numbers), inverses)
            moved = b.fadd(scaled, _constant(self.numbers, ROUNDER))
            return b.sub(b.bitcast(moved, words), _constant(words, 0x4B400000))

        def high_byte(value: Any) -> Any:
            return b.ashr(b.add(value, _constant(words, 128)), _constant(words, 8))

        tops = b.add(self.out, I64(8 * rows))
        lows = b.add(tops, b.mul(self.pairs, I64(2 * rows)))
        with Loop(b, self.pairs, self.at_once, [_constant(words, 0)]) as loop:
            both = [
                (b.shl(word, _constant(words, 16)), b.and_(word, _constant(words, 0xFFFF0000)))
                for word in self._load(loop.index)
            ]
            values = [(rounded(first), rounded(second)) for first, second in both]
            place, total = b.mul(loop.index, I64(2 * rows)), loop.values[0]
            self._store_bytes(values, b.add(lows, place))
            self._store_bytes(
                [(high_byte(first), high_byte(second)) for first, second in values], b.add(tops, place)
            )
            for first, second in values:
                total = b.add(total, b.add(first, second))
            loop.close([total])
        return loop.results[0]

    def _store_bytes(self, values: list[tuple[Any, Any]], place: Any) -> None:
        """Words of four bytes: the low bytes of two pairs (k, k + 1)."""
        b, rows = self.b, self.rows
        kind = self.words if self.one_pair else vector(I32, self.lanes // 2)
        if not self.one_pair:
            evens = [pair * rows + row for pair in range(0, self.at_once, 2) for row in range(rows)]
            odds = [lane + rows for lane in evens]
            values = [
                (self._lanes(first, lanes), self._lanes(second, lanes))
                for first, second in values
                for lanes in (evens, odds)
            ]
        for i in range(0, len(values), 2):
            total = b.and_(values[i][0], _constant(kind, 255))
            for byte, part in enumerate((values[i][1], *values[i + 1]), start=1):
                total = b.or_(total, b.shl(b.and_(part, _constant(kind, 255)), _constant(kind, 8 * byte)))
            b.store(total, b.inttoptr(b.add(place, I64(2 * rows * i)), PTR), align=4)

    def _load(self, pair: Any) -> list[Any]:
        """The next `at_once` pairs of all rows, as words of two bfloat16."""
        b, count = self.b, self.at_once if self.one_pair else 1
        places = [b.add(self.x, b.mul(b.add(pair, I64(i)), I64(4 * self.rows))) for i in range(count)]
        return [b.load(b.inttoptr(place, PTR), typ=self.words, align=4) for place in places]

    def _reduce(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Combine the lanes of each row, of which there are several where a vector holds several pairs."""
        width = self.lanes
        while width > self.rows:
            width //= 2
            lower, upper = list(range(width)), list(range(width, 2 * width))
            value = combine(self._lanes(value, lower), self._lanes(value, upper))
        return value

    def _lanes(self, value: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(value, value, ir.Constant(vector(I32, len(lanes)), lanes))

    def _splat(self, value: Any, kind: ir.VectorType) -> Any:
        b = self.b
        one = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return b.shuffle_vector(one, one, ir.Constant(vector(I32, kind.count), [0] * kind.count))


def _constant(kind: ir.VectorType, value: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _make(rows: int, at_once: int) -> Any:
    """The intrinsic that quantizes one group of `rows` packed rows, `at_once` pairs at a time."""

    @intrinsic
    def quantize(typingctx: Any, x: Any, out: Any, pairs: Any, offset: Any, max_code: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x_, out_, pairs_, offset_, max_code_ = arguments
            _RowQuantizer(builder, rows, at_once, x_, out_, pairs_).emit(offset_, max_code_)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return quantize


_one, _one_long, _two = _make(1, 4), _make(1, 16), _make(2, 4)
_four, _eight, _twelve = _make(4, 4), _make(8, 4), _make(12, 4)


@inline
def quantized_row_bytes(groups, pairs):
    """Bytes of one quantized row."""
    return groups * (pairs + 2) * 4


@noinline
def quantize_rows(x, first, last, height, groups, pairs, offset, out):
    """Quantize the tiles `first` to `last` of packed bfloat16 rows. height: rows of a tile."""
    step, max_code = (pairs + 2) * 4 * height, min(MAX_CODE, (1 << 31) // (256 * pairs))
    for group in range(first * groups, last * groups):
        source, target = x + group * pairs * 4 * height, out + group * step
        if height == 1:
            if pairs % 16 == 0:
                _one_long(source, target, pairs, offset, max_code)
            else:
                _one(source, target, pairs, offset, max_code)
        elif height == 2:
            _two(source, target, pairs, offset, max_code)
        elif height == 4:
            _four(source, target, pairs, offset, max_code)
        elif height == 8:
            _eight(source, target, pairs, offset, max_code)
        else:
            _twelve(source, target, pairs, offset, max_code)
