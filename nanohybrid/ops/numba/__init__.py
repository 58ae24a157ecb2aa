"""The numba runtime: compiled at first use by LLVM for this processor and cached, threads, vectors, and the loops of some ops.

Everything else in `ops` works without numba; `available()` says whether it can be used.
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
