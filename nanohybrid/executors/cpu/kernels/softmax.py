"""One row's scores of a page -> its probabilities so far, as vectors of 16: one reading for the largest, one for the exponentials.

Probabilities are 2^(scores * scale - most), where `most` is the largest of scores * scale until now and `scale` has log2 e in it:
whatever `most` is rounded to, it is the same in all of a row's terms, and cancels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.executors.cpu.kernels.gemm_tile import PAIRED
from nanohybrid.ops.numba.llvm import (
    F32,
    I16,
    I32,
    I64,
    PTR,
    V16F,
    V16I,
    BFloat,
    Loop,
    function,
    spread,
    vector,
)
from nanohybrid.ops.sizes import PAGE

LEAST = -3e38  # below every score: what `most` begins with
POWER_OF_TWO = (
    9.582852935e-3,
    5.5906424826e-2,
    2.4024098615e-1,
    6.93124193e-1,
    1.0,
)  # 2^f, |f| <= 1/2, within 2.9e-6
BIAS = float(3 << 22) + 127.0  # added to a whole number, it leaves that + 127 in the low bits: an exponent


def make_softmax(paired: bool = PAIRED) -> tuple[Any, Any]:
    """Two intrinsics of numba, for a row that sees all of a page and for one that sees the first `seen` tokens (none: seen <= 0):

    whole(scores' address, probabilities' address, scale, most's address, weights' address)
    partial(..., seen, vectors)

    Scores are fp32 [PAGE], or at least the first 16 * `vectors`; as many probabilities are written as bfloat16, zeros where unseen.
    `most` is brought up to date, and 16 lanes of fp32 weights, the probabilities' sum. They return the factor that makes up for
    the new `most` in all sums so far: exactly 1 where it is the old one. `paired`: with AVX512-BF16's instructions.
    """
    word, number = types.int64, types.float32

    @intrinsic
    def whole(typingctx: Any, scores: Any, out: Any, scale: Any, most: Any, weights: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _Row(builder, paired, *arguments).whole()

        return number(word, word, number, word, word), generate

    @intrinsic
    def partial(
        typingctx: Any, scores: Any, out: Any, scale: Any, most: Any, weights: Any, seen: Any, vectors: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _Row(builder, paired, *arguments[:5]).partial(*arguments[5:])

        return number(word, word, number, word, word, word, word), generate

    return whole, partial


class _Row:
    """Writes the instructions for one row. Both kinds do the same to what is seen, in the same order."""

    def __init__(
        self, builder: ir.IRBuilder, paired: bool, scores: Any, out: Any, scale: Any, most: Any, weights: Any
    ) -> None:
        self.b, self.paired, self.scores, self.out, self.most, self.weights = (
            builder,
            paired,
            scores,
            out,
            most,
            weights,
        )
        self.scale = spread(builder, scale)
        self.before = spread(builder, builder.load(builder.inttoptr(most, PTR), typ=F32, align=4))

    def whole(self) -> Any:
        b, count = self.b, PAGE // 16
        rows = [self._load(I64(i)) for i in range(count)]
        top = rows[0]
        for row in rows[1:]:
            top = self._larger(row, top)
        now = self._begin(top)
        total = None
        for i, row in enumerate(rows):
            chance = self._chance(row, now)
            self._store(chance, I64(i))
            total = chance if total is None else b.fadd(total, chance)
        return self._end(now, total)

    def partial(self, seen: Any, vectors: Any) -> Any:
        b = self.b
        lanes, least, zero = (
            ir.Constant(V16I, list(range(16))),
            *(ir.Constant(V16F, [value] * 16) for value in (LEAST, 0.0)),
        )

        def visible(i: Any) -> Any:
            left = b.trunc(b.sub(seen, b.mul(i, I64(16))), I32)
            return b.icmp_signed("<", lanes, spread(b, left))

        with Loop(b, vectors, 1, [least]) as tops:
            row = b.select(visible(tops.index), self._load(tops.index), least)
            tops.close([self._larger(row, tops.values[0])])
        now = self._begin(tops.results[0])
        with Loop(b, vectors, 1, [zero]) as loop:
            chance = b.select(visible(loop.index), self._chance(self._load(loop.index), now), zero)
            self._store(chance, loop.index)
            loop.close([b.fadd(loop.values[0], chance)])
        return self._end(now, loop.results[0])

    def _load(self, i: Any) -> Any:
        b = self.b
        return b.load(b.inttoptr(b.add(self.scores, b.mul(i, I64(64))), PTR), typ=V16F, align=4)

    def _larger(self, one: Any, other: Any) -> Any:
        """Lane by lane; `other` where `one` is no number."""
        return self.b.select(self.b.fcmp_ordered(">", one, other), one, other)

    def _begin(self, top: Any) -> Any:
        """The largest of all lanes and of what was before, scaled, in all lanes."""
        b = self.b
        for step in (8, 4, 2, 1):
            turned = b.shuffle_vector(top, top, ir.Constant(V16I, [(lane + step) % 16 for lane in range(16)]))
            top = self._larger(turned, top)
        return self._larger(b.fmul(top, self.scale), self.before)

    def _chance(self, row: Any, now: Any) -> Any:
        return self._power(self._fma(row, self.scale, self.b.fneg(now)))

    def _power(self, t: Any) -> Any:
        """2^t for t <= 0, within 3e-6 of itself; 2^-125 for all below."""
        b = self.b
        constant = lambda value: ir.Constant(V16F, [value] * 16)  # noqa: E731
        t = b.select(b.fcmp_ordered("<", t, constant(-125.0)), constant(-125.0), t)
        whole = b.call(function(b, "llvm.nearbyint.v16f32", V16F, [V16F]), [t])
        fraction = b.fsub(t, whole)
        result = constant(POWER_OF_TWO[0])
        for coefficient in POWER_OF_TWO[1:]:
            result = self._fma(result, fraction, constant(coefficient))
        exponent = b.shl(b.bitcast(b.fadd(whole, constant(BIAS)), V16I), ir.Constant(V16I, [23] * 16))
        return b.fmul(result, b.bitcast(exponent, V16F))

    def _fma(self, *operands: Any) -> Any:
        return self.b.call(function(self.b, "llvm.fma.v16f32", V16F, [V16F] * 3), list(operands))

    def _store(self, chance: Any, i: Any) -> None:
        """As bfloat16, rounded to nearest even."""
        b, kind = self.b, vector(BFloat())
        place = b.inttoptr(b.add(self.out, b.mul(i, I64(32))), PTR)
        if self.paired:
            b.store(
                b.call(function(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", kind, [V16F]), [chance]),
                place,
                align=4,
            )
            return
        constant = lambda value: ir.Constant(V16I, [value] * 16)  # noqa: E731
        bits = b.bitcast(chance, V16I)
        odd = b.and_(b.lshr(bits, constant(16)), constant(1))
        rounded = b.lshr(b.add(bits, b.add(odd, constant(0x7FFF))), constant(16))
        b.store(b.trunc(rounded, vector(I16)), place, align=4)

    def _end(self, now: Any, total: Any) -> Any:
        b = self.b
        shrink, lanes = self._power(b.fsub(self.before, now)), b.inttoptr(self.weights, PTR)
        b.store(self._fma(b.load(lanes, typ=V16F, align=4), shrink, total), lanes, align=4)
        b.store(b.extract_element(now, I32(0)), b.inttoptr(self.most, PTR), align=4)
        return b.extract_element(shrink, I32(0))
