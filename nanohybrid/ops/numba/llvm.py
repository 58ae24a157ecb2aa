"""LLVM instructions that numba lacks: bfloat16 vectors, loops as IR, atomics, calls by address, clocks."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
PTR = ir.PointerType()


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not define."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def vector(element: ir.Type, lanes: int = 16) -> ir.VectorType:
    """The type of a vector of `lanes` elements."""
    return ir.VectorType(element, lanes)


V16F, V16I = vector(F32), vector(I32)


def function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """The declaration of an LLVM intrinsic or a C library function, made once per module."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def splat(builder: ir.IRBuilder, value: Any) -> Any:
    """A scalar in all 16 lanes of a vector."""
    kind = vector(value.type)
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(lane, ir.Constant(kind, ir.Undefined), ir.Constant(V16I, [0] * 16))


class Loop:
    """`for index in range(0, end, step)` as IR, with loop-carried values. The body runs at least once.

    Use it as a context manager: inside, `index` and `values` are the current ones, and the body ends with
    `close(next values)`. Afterwards `results` holds the last values.
    """

    def __init__(self, builder: ir.IRBuilder, end: Any, step: int, values: list[Any]) -> None:
        self.b, self.end, self.step = builder, end, step
        self._first = values
        self.results: list[Any] = []

    def __enter__(self) -> Loop:
        b = self.b
        before = b.block
        self._body, self._after = b.append_basic_block("body"), b.append_basic_block("after")
        b.branch(self._body)
        b.position_at_end(self._body)
        self.index = b.phi(I64)
        self.index.add_incoming(I64(0), before)
        self.values = [b.phi(value.type) for value in self._first]
        for phi, value in zip(self.values, self._first, strict=True):
            phi.add_incoming(value, before)
        return self

    def close(self, values: list[Any]) -> None:
        """End the body; `values` are carried into the next iteration."""
        b = self.b
        following = b.add(self.index, I64(self.step))
        self.index.add_incoming(following, b.block)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, self.end), self._body, self._after)
        self.results = values

    def __exit__(self, *error: Any) -> None:
        self.b.position_at_end(self._after)


def cpu_has(*features: str) -> bool:
    """Whether this processor has all of these features, by LLVM's names."""
    host = binding.get_host_cpu_features()
    return all(host.get(feature, False) for feature in features)


def _atomic(operation: str) -> Any:
    @intrinsic
    def change(typingctx: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.atomic_rmw(operation, builder.inttoptr(arguments[0], PTR), arguments[1], "seq_cst")

        return types.int64(types.int64, types.int64), generate

    return change


# (address, value) -> the old value. All such changes have one global order (seq_cst).
atomic_add = _atomic("add")
atomic_exchange = _atomic("xchg")


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """Load a word; no later memory access moves before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], PTR), "acquire", 8, typ=I64)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Store a word; no earlier memory access moves after it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.atomic_rmw("xchg", builder.inttoptr(arguments[0], PTR), arguments[1], "release")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def invoke(typingctx: Any, code: Any, rank: Any, size: Any, control: Any, call: Any) -> Any:
    """Call the kernel whose machine code is at the address `code`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def pause(typingctx: Any) -> Any:
    """Hint to the processor that this is a spin loop; nothing on processors without the x86 instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if cpu_has("sse2"):
            builder.call(function(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def sched_yield(typingctx: Any) -> Any:
    """The system call sched_yield: another thread may run on this processor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(function(builder, "sched_yield", I32, []), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def clock_ns(typingctx: Any) -> Any:
    """The real-time clock in nanoseconds; only differences are meaningful."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        timespec = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        place = builder.bitcast(timespec, I64.as_pointer())
        builder.call(function(builder, "clock_gettime", I32, [I32, place.type]), [I32(0), place])
        part = lambda index: builder.load(builder.gep(place, [I64(index)]))  # noqa: E731
        return builder.add(builder.mul(part(0), I64(1_000_000_000)), part(1))

    return types.int64(), generate


@intrinsic
def cycle_counter(typingctx: Any) -> Any:
    """The processor's cycle counter (x86: the time stamp counter, which runs at a constant rate)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(function(builder, "llvm.readcyclecounter", I64, []), [])

    return types.int64(), generate
