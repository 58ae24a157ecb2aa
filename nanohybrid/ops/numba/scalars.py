"""Scalar conversions and the exponential, written as LLVM instructions. Loops over them vectorize.

numba computes in 64 bits wherever a constant takes part; written as instructions the computation stays in 32.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.llvm import F32, I16, I32, function

EXP2_COEFFICIENTS = (
    1.54697402e-4,
    1.34004417e-3,
    9.61802558e-3,
    5.55032719e-2,
    2.40226512e-1,
    6.93147207e-1,
    1.0,
)  # of a polynomial for 2^f, |f| <= 1/2
LOG2_E = 1.4426950408889634
CONTRACT = ("contract",)


@intrinsic
def bf16_to_f32(typingctx: Any, bits: Any) -> Any:
    """The bits of a bfloat16 -> fp32, exact."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), I32(16)), F32)

    return types.float32(types.uint16), generate


@intrinsic
def f32_to_bf16(typingctx: Any, value: Any) -> Any:
    """fp32 -> the bits of the nearest bfloat16, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16))
        number = builder.fcmp_ordered("ord", arguments[0], arguments[0])
        return builder.trunc(builder.select(number, rounded, I32(0x7FC0)), I16)

    return types.uint16(types.float32), generate


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """e^x in fp32, with a relative error below 3e-7 (6e-6 where |x| is 80); clamped to 2^-126 and 2^127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = builder
        t = b.fmul(arguments[0], F32(LOG2_E))
        for bound, beyond in ((-126.0, "<"), (127.0, ">")):
            t = b.select(b.fcmp_ordered(beyond, t, F32(bound)), F32(bound), t)
        n = b.call(function(b, "llvm.nearbyint.f32", F32, [F32]), [t])
        f = b.fsub(t, n)
        p: Any = F32(EXP2_COEFFICIENTS[0])
        for coefficient in EXP2_COEFFICIENTS[1:]:
            p = b.fadd(b.fmul(p, f, flags=CONTRACT), F32(coefficient), flags=CONTRACT)
        exponent = b.call(function(b, "llvm.fptosi.sat.i32.f32", I32, [F32]), [n])
        return b.fmul(p, b.bitcast(b.shl(b.add(exponent, I32(127)), I32(23)), F32))

    return types.float32(types.float32), generate
