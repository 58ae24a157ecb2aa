"""How kernels are compiled: without the GIL, sums in any order, and kept on disk under the digest of this folder's sources.

A kernel is `kernel(rank, size, barrier, call)`, four words: `call` is the address of its arguments, words or float64, as
`team.run` lays them out. So that a thread of the team can run one without Python, by its address.

numba keys what it keeps by the file that holds a function; kernels here are woven from several files, and a change in one must
not meet old code of another.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
from numba import types

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is no number must stay visible
_lock = threading.Lock()


class kernel:
    """Compiled when its address is first asked for, nopython; kept between processes where a cache directory can be written."""

    def __init__(self, python: Callable[[int, int, int, int], None]) -> None:
        self.python, self.__name__, self.__doc__ = python, python.__name__, python.__doc__

    @cached_property
    def _compiled(self) -> Any:
        with _kept() as cached:
            return numba.cfunc(
                types.void(*[types.int64] * 4), cache=cached, fastmath=FASTMATH, error_model="numpy"
            )(self.python)

    @cached_property
    def address(self) -> int:
        """Of machine code: void (int64, int64, int64, int64)."""
        return int(self._compiled.address)

    @cached_property
    def alone(self) -> Callable[[int, int, int, int], None]:
        """To be called from Python, which other threads have meanwhile."""
        found: Callable[[int, int, int, int], None] = self._compiled.ctypes
        return found


def loop(python: Callable[..., Any]) -> Any:
    """What one thread calls with whatever numba knows from Python: compiled at the first call, nopython and nogil; kept as kernels are."""
    with _kept() as cached:
        return numba.njit(nogil=True, cache=cached, fastmath=FASTMATH, error_model="numpy")(python)


def inlined(python: Callable[..., Any]) -> Any:
    """A piece of a kernel: compiled into it, never called from outside.

    Always inlined: a piece that stayed a function would be in several kernels, each with its own order of sums, and a process would
    take that of whichever kernel it loaded first.
    """
    return numba.njit(nogil=True, forceinline=True, fastmath=FASTMATH, error_model="numpy")(python)


def called(python: Callable[..., Any]) -> Any:
    """A large piece of one kernel, or one without sums of its own that LLVM may order: compiled once in each kernel that has it."""
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy")(python)


@contextmanager
def _kept() -> Iterator[bool]:
    """Have numba keep what is compiled here in our directory; whether it can."""
    config: Any = numba.config
    with _lock:
        before, config.CACHE_DIR = config.CACHE_DIR, str(directory())
        try:
            yield ours(directory())
        finally:
            config.CACHE_DIR = before


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
    root = (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanohybrid"
    )
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    folders = (
        package / "ops" / "numba",
        package / "executors" / "cpu" / "kernels",
    )  # all that is woven into kernels
    for source in (
        *(file for folder in folders for file in sorted(folder.glob("*.py"))),
        package / "ops" / "sizes.py",
    ):
        digest.update(source.read_bytes())
    return root / "kernels" / digest.hexdigest()[:16]
