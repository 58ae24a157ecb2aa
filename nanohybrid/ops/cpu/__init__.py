"""CPU kernels in numba: compiled by LLVM on the user's machine at first use and kept, so that nothing is built at install.

Everything else in `ops` works without this folder; `available()` says whether it can be used here.
"""

from functools import cache


@cache
def available() -> bool:
    """Whether numba can be imported; what it compiles for is whatever processor this is."""
    try:
        from nanohybrid.ops.cpu import tile  # noqa: F401
    except ImportError:
        return False
    return True
