"""The numba runtime and the loops of the numba forms: compilation, threads, LLVM helpers, vector kernels.

LLVM compiles the kernels for this processor at first use; the machine code is cached on disk. Everything else
in `ops` works without numba.
"""

from functools import cache


@cache
def available() -> bool:
    """Whether numba can be imported."""
    try:
        from nanohybrid.ops.numba import jit  # noqa: F401
    except ImportError:
        return False
    return True
