"""Online softmax of one row's scores with a page: maximum and exponentials in vectors of 16.

Probabilities are 2^(scores * scale - maximum), where `maximum` is the largest of scores * scale so far and
`scale` includes log2 e. The rounding of `maximum` is the same in all of a row's terms, and cancels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanohybrid.executors.cpu.kernels.gemm_tile import HAS_AVX512_BF16
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
    splat,
    vector,
)
from nanohybrid.ops.sizes import PAGE

INITIAL_MAX = -3e38  # below every score: a row's maximum before its first page
# Coefficients of a polynomial for 2^f, |f| <= 1/2, with a relative error below 2.9e-6.
EXP2_COEFFICIENTS = (9.582852935e-3, 5.5906424826e-2, 2.4024098615e-1, 6.93124193e-1, 1.0)
EXPONENT_BIAS = (
    float(3 << 22) + 127.0
)  # a whole number plus this has the biased fp32 exponent in its low bits


def make_softmax(bf16_instructions: bool = HAS_AVX512_BF16) -> tuple[Any, Any]:
    """Two numba intrinsics: for a row that sees a whole page, and for one that sees its first `seen` tokens.

        page(scores, probabilities, scale, maximum, totals) -> rescale
        masked(scores, probabilities, scale, maximum, totals, seen, vectors) -> rescale

    All arguments but `scale` (fp32), `seen` and `vectors` are addresses. scores: fp32 [PAGE], or at least the
    first 16 * `vectors`. As many bfloat16 probabilities are written, zeros where unseen. `maximum` (fp32) is
    updated, and the probabilities are added to the 16 fp32 lanes of `totals`. `rescale` is the factor for all
    earlier sums of the row: exactly 1 where the maximum has not changed. bf16_instructions: convert with
    AVX512-BF16.
    """
    word, number = types.int64, types.float32

    @intrinsic
    def page(typingctx: Any, scores: Any, out: Any, scale: Any, maximum: Any, totals: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _Row(builder, bf16_instructions, *arguments).page()

        return number(word, word, number, word, word), generate

    @intrinsic
    def masked(
        typingctx: Any, scores: Any, out: Any, scale: Any, maximum: Any, totals: Any, seen: Any, vectors: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _Row(builder, bf16_instructions, *arguments[:5]).masked(*arguments[5:])

        return number(word, word, number, word, word, word, word), generate

    return page, masked


class _Row:
    """Emits the IR for one row.

    Both intrinsics apply the same operations to the seen tokens, in the same order.
    """

    def __init__(
        self,
        builder: ir.IRBuilder,
        bf16_instructions: bool,
        scores: Any,
        out: Any,
        scale: Any,
        maximum: Any,
        totals: Any,
    ) -> None:
        self.b, self.bf16_instructions = builder, bf16_instructions
        self.scores, self.out, self.maximum, self.totals = scores, out, maximum, totals
        self.scale = splat(builder, scale)
        self.before = splat(builder, builder.load(builder.inttoptr(maximum, PTR), typ=F32, align=4))

    def page(self) -> Any:
        """A row that sees the whole page; the rescale factor."""
        b, count = self.b, PAGE // 16
        rows = [self._load(I64(i)) for i in range(count)]
        top = rows[0]
        for row in rows[1:]:
            top = self._max(row, top)
        now = self._new_maximum(top)
        total = None
        for i, row in enumerate(rows):
            probability = self._probability(row, now)
            self._store(probability, I64(i))
            total = probability if total is None else b.fadd(total, probability)
        return self._finish(now, total)

    def masked(self, seen: Any, vectors: Any) -> Any:
        """A row that sees the first `seen` tokens of the first 16 * `vectors`; the rescale factor."""
        b = self.b
        lanes, least, zero = (
            ir.Constant(V16I, list(range(16))),
            *(ir.Constant(V16F, [value] * 16) for value in (INITIAL_MAX, 0.0)),
        )

        def visible(i: Any) -> Any:
            left = b.trunc(b.sub(seen, b.mul(i, I64(16))), I32)
            return b.icmp_signed("<", lanes, splat(b, left))

        with Loop(b, vectors, 1, [least]) as tops:
            row = b.select(visible(tops.index), self._load(tops.index), least)
            tops.close([self._max(row, tops.values[0])])
        now = self._new_maximum(tops.results[0])
        with Loop(b, vectors, 1, [zero]) as loop:
            probability = b.select(visible(loop.index), self._probability(self._load(loop.index), now), zero)
            self._store(probability, loop.index)
            loop.close([b.fadd(loop.values[0], probability)])
        return self._finish(now, loop.results[0])

    def _load(self, i: Any) -> Any:
        b = self.b
        return b.load(b.inttoptr(b.add(self.scores, b.mul(i, I64(64))), PTR), typ=V16F, align=4)

    def _max(self, one: Any, other: Any) -> Any:
        """The maximum lane by lane; `other` where `one` is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", one, other), one, other)

    def _new_maximum(self, top: Any) -> Any:
        """The new maximum in all lanes: of all scores, scaled, and of the maximum so far."""
        b = self.b
        for step in (8, 4, 2, 1):
            rotated = b.shuffle_vector(
                top, top, ir.Constant(V16I, [(lane + step) % 16 for lane in range(16)])
            )
            top = self._max(rotated, top)
        return self._max(b.fmul(top, self.scale), self.before)

    def _probability(self, row: Any, now: Any) -> Any:
        """2^(row * scale - now)."""
        return self._exp2(self._fma(row, self.scale, self.b.fneg(now)))

    def _exp2(self, t: Any) -> Any:
        """2^t for t <= 0, with a relative error below 3e-6; at least 2^-125."""
        b = self.b
        constant = lambda value: ir.Constant(V16F, [value] * 16)  # noqa: E731
        t = b.select(b.fcmp_ordered("<", t, constant(-125.0)), constant(-125.0), t)
        nearest = b.call(function(b, "llvm.nearbyint.v16f32", V16F, [V16F]), [t])
        fraction = b.fsub(t, nearest)
        result = constant(EXP2_COEFFICIENTS[0])
        for coefficient in EXP2_COEFFICIENTS[1:]:
            result = self._fma(result, fraction, constant(coefficient))
        exponent = b.shl(
            b.bitcast(b.fadd(nearest, constant(EXPONENT_BIAS)), V16I), ir.Constant(V16I, [23] * 16)
        )
        return b.fmul(result, b.bitcast(exponent, V16F))

    def _fma(self, *operands: Any) -> Any:
        return self.b.call(function(self.b, "llvm.fma.v16f32", V16F, [V16F] * 3), list(operands))

    def _store(self, probability: Any, i: Any) -> None:
        """Store 16 probabilities as bfloat16, rounded to nearest even."""
        b, kind = self.b, vector(BFloat())
        place = b.inttoptr(b.add(self.out, b.mul(i, I64(32))), PTR)
        if self.bf16_instructions:
            b.store(
                b.call(function(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", kind, [V16F]), [probability]),
                place,
                align=4,
            )
            return
        constant = lambda value: ir.Constant(V16I, [value] * 16)  # noqa: E731
        bits = b.bitcast(probability, V16I)
        odd = b.and_(b.lshr(bits, constant(16)), constant(1))
        rounded = b.lshr(b.add(bits, b.add(odd, constant(0x7FFF))), constant(16))
        b.store(b.trunc(rounded, vector(I16)), place, align=4)

    def _finish(self, now: Any, total: Any) -> Any:
        """Update the maximum and the totals in memory; the rescale factor."""
        b = self.b
        rescale, lanes = self._exp2(b.fsub(self.before, now)), b.inttoptr(self.totals, PTR)
        b.store(self._fma(b.load(lanes, typ=V16F, align=4), rescale, total), lanes, align=4)
        b.store(b.extract_element(now, I32(0)), b.inttoptr(self.maximum, PTR), align=4)
        return b.extract_element(rescale, I32(0))
