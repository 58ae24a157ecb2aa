"""Raw memory in kernels: typed views, addresses of elements, the lifetime of scratch arrays.

Kernels take addresses (int64) and view them with `as_f32` and the like, so nothing is boxed or reference
counted inside. bfloat16 is handled as its 16 bits; scalars.py converts it.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from nanohybrid.ops.numba.jit import inline

F32_BYTES, BF16_BYTES, I64_BYTES = 4, 2, 8


def _view(kind: types.Type) -> Any:
    @intrinsic
    def address_of(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), generate

    return address_of


as_f32 = _view(types.float32)  # address -> pointer to fp32 elements
as_bf16 = _view(types.uint16)  # address -> pointer to the bits of bfloat16 elements
as_i64 = _view(types.int64)
as_f64 = _view(types.float64)


@inline
def f32_at(address, index):
    """The address of the index-th fp32 element."""
    return address + index * F32_BYTES


@inline
def bf16_at(address, index):
    """The address of the index-th bfloat16 element."""
    return address + index * BF16_BYTES


@inline
def i64_at(address, index):
    """The address of the index-th int64 element."""
    return address + index * I64_BYTES


@intrinsic
def keep_alive(typingctx: Any, array: Any) -> Any:
    """Does nothing with an array whose address is in use: numba frees it after the last use of its name."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), generate
