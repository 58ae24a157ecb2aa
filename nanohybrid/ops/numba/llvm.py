"""What numba lacks for kernels: bfloat16 vectors, raw addresses, bit casts, atomics and a pause, as intrinsics of a few lines.

Kernels take addresses (int64) and make views of them with `floats`, `halves`, `words` and `doubles`; nothing is boxed or counted inside.
"""

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
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def vector(element: ir.Type, lanes: int = 16) -> ir.VectorType:
    return ir.VectorType(element, lanes)


V16F, V16I = vector(F32), vector(I32)


def function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """The declaration of an LLVM intrinsic or of a function of the C library, made once a module."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def spread(builder: ir.IRBuilder, value: Any) -> Any:
    """A number in all 16 lanes of a vector."""
    kind = vector(value.type)
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(lane, ir.Constant(kind, ir.Undefined), ir.Constant(V16I, [0] * 16))


class Loop:
    """for index in range(0, end, step), carrying values; the body calls `close` with their next ones. At least one round."""

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
        b = self.b
        following = b.add(self.index, I64(self.step))
        self.index.add_incoming(following, b.block)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, self.end), self._body, self._after)
        self.results = values

    def __exit__(self, *error: Any) -> None:
        self.b.position_at_end(self._after)


def has(*features: str) -> bool:
    """Whether this processor has all of these, by LLVM's names."""
    host = binding.get_host_cpu_features()
    return all(host.get(feature, False) for feature in features)


def _view(kind: types.Type) -> Any:
    @intrinsic
    def address_of(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), generate

    return address_of


floats = _view(types.float32)  # address -> pointer to fp32
halves = _view(types.uint16)  # ... to bfloat16, as its bits
words = _view(types.int64)
doubles = _view(types.float64)


def _atomic(operation: str) -> Any:
    @intrinsic
    def change(typingctx: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.atomic_rmw(operation, builder.inttoptr(arguments[0], PTR), arguments[1], "seq_cst")

        return types.int64(types.int64, types.int64), generate

    return change


# Change a word and return what it was; all such changes have one order.
add_atomically = _atomic("add")
exchange = _atomic("xchg")


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """*address of a word, before whatever follows."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], PTR), "acquire", 8, typ=I64)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """*address = value of a word, after whatever came before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.atomic_rmw("xchg", builder.inttoptr(arguments[0], PTR), arguments[1], "release")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def hold(typingctx: Any, array: Any) -> Any:
    """Does nothing with an array, after its address has been used: numba gives it back after the last use of its name."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), generate


@intrinsic
def invoke(typingctx: Any, code: Any, rank: Any, size: Any, barrier: Any, call: Any) -> Any:
    """Run the kernel at the address `code`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a loop which waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if has("sse2"):
            builder.call(function(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread have the processor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(function(builder, "sched_yield", I32, []), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def nanoseconds(typingctx: Any) -> Any:
    """Of the clock, to take differences of."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.bitcast(
            cgutils.alloca_once(builder, ir.ArrayType(I64, 2)), I64.as_pointer()
        )  # a timespec
        builder.call(function(builder, "clock_gettime", I32, [I32, place.type]), [I32(0), place])
        part = lambda index: builder.load(builder.gep(place, [I64(index)]))  # noqa: E731
        return builder.add(builder.mul(part(0), I64(1_000_000_000)), part(1))

    return types.int64(), generate


@intrinsic
def ticks(typingctx: Any) -> Any:
    """The processor's counter of cycles, or of whatever it counts at one pace."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(function(builder, "llvm.readcyclecounter", I64, []), [])

    return types.int64(), generate
