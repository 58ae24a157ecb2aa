"""How kernels are compiled: without the GIL, sums in any order, and kept on disk under the digest of this folder's sources.

numba keys what it keeps by the file that holds a function; kernels here are woven from several files, and a change in one must
not meet old code of another.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is no number must stay visible
_lock = threading.Lock()


def kernel(python: Callable[..., Any]) -> Any:
    """Compile at the first call, nopython and nogil; kept between processes where a cache directory can be written."""
    with _lock:
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, str(directory())
        try:
            return numba.njit(nogil=True, cache=ours(directory()), fastmath=FASTMATH, error_model="numpy")(python)
        finally:
            config.CACHE_DIR = before


def inlined(python: Callable[..., Any]) -> Any:
    """A piece of a kernel: compiled into it, never called from outside."""
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy")(python)


def ours(place: Path) -> bool:
    """Whether this user owns the directory and may write to it; made where it is missing. numba unpickles what it finds there, so
    that nobody else's may be read."""
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.access(place, os.W_OK) and (not hasattr(os, "getuid") or place.stat().st_uid == os.getuid())
    except OSError:
        return False


def kept() -> bool:
    """Whether this version's kernels were compiled before, and are read from disk."""
    return ours(directory()) and any(directory().rglob("*.nbi"))


@cache
def directory() -> Path:
    """NANOHYBRID_CACHE, else the user's cache directory; below it a folder for these very sources."""
    base = os.environ.get("NANOHYBRID_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanohybrid"
    digest = hashlib.sha256()
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parent.parent / "sizes.py"):
        digest.update(source.read_bytes())
    return root / "kernels" / digest.hexdigest()[:16]
