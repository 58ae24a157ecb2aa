"""How kernels are compiled: without the GIL, with reassociated sums, cached by a digest of the sources.

A kernel is a function `kernel(rank, size, control, call)` of four int64 words. `rank` and `size` number the
threads that run it, `control` is the address of the thread pool's control block (threads.py), and `call` is
the address of the arguments as `threads.run` writes them. This one signature lets a thread of the pool run
any kernel by its address, without Python.

numba keys its cache by the file that holds the compiled function. A kernel here is inlined from several
files, so the cache directory's name is a digest of all of them: a change in any file never meets machine code
of the old version.
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

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # without nnan and ninf: NaN and infinity propagate
_lock = threading.Lock()


class kernel:
    """Decorator.

    Compiles the function when its address is first needed; the machine code is cached where possible.
    """

    def __init__(self, py_func: Callable[[int, int, int, int], None]) -> None:
        self.py_func, self.__name__, self.__doc__ = py_func, py_func.__name__, py_func.__doc__

    @cached_property
    def _compiled(self) -> Any:
        with _cache_directory() as cached:
            return numba.cfunc(
                types.void(*[types.int64] * 4), cache=cached, fastmath=FASTMATH, error_model="numpy"
            )(self.py_func)

    @cached_property
    def address(self) -> int:
        """The address of the machine code, void (int64, int64, int64, int64)."""
        return int(self._compiled.address)

    @cached_property
    def from_python(self) -> Callable[[int, int, int, int], None]:
        """Runs the kernel on the calling thread, with the GIL released."""
        function: Callable[[int, int, int, int], None] = self._compiled.ctypes
        return function


def njit(python: Callable[..., Any]) -> Any:
    """Decorator for a single-threaded loop over numpy arrays: without the GIL, cached as kernels are."""
    with _cache_directory() as cached:
        return numba.njit(nogil=True, cache=cached, fastmath=FASTMATH, error_model="numpy")(python)


def inline(python: Callable[..., Any]) -> Any:
    """Decorator for a part of a kernel, which is always inlined and never called from outside.

    A part that stayed a function would be compiled into several kernels, each with its own order of sums, and
    a process would link the version of whichever kernel it loaded first.
    """
    return numba.njit(nogil=True, forceinline=True, fastmath=FASTMATH, error_model="numpy")(python)


def inline_ir(python: Callable[..., Any]) -> Any:
    """Decorator for a part of a kernel that calls large parts. numba inlines it before it compiles anything.

    `inline` compiles a part, with all that it calls, once by itself, before LLVM inlines it. For a part that
    calls the GEMM that is seconds of compile time; with this decorator it is none.
    """
    return numba.njit(nogil=True, inline="always", fastmath=FASTMATH, error_model="numpy")(python)


def noinline(python: Callable[..., Any]) -> Any:
    """Decorator for a large part of a kernel, compiled once in each kernel that calls it.

    Use it only where one kernel calls the part, or where the part has no sums that LLVM may reorder (see
    `inline`).
    """
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy")(python)


@contextmanager
def _cache_directory() -> Iterator[bool]:
    """Point numba's cache at `cache_directory` meanwhile; gives whether that directory can be used."""
    config: Any = numba.config
    with _lock:
        before, config.CACHE_DIR = config.CACHE_DIR, str(cache_directory())
        try:
            yield is_private(cache_directory())
        finally:
            config.CACHE_DIR = before


def is_private(directory: Path) -> bool:
    """Whether this user owns the directory and may write to it; a missing directory is created with mode 700.

    numba unpickles what it finds in its cache, so a directory of another user must not be read.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        owned = not hasattr(os, "getuid") or directory.stat().st_uid == os.getuid()
        return os.access(directory, os.W_OK) and owned
    except OSError:
        return False


def has_cached_kernels() -> bool:
    """Whether kernels of this version were compiled before and can be read from disk."""
    return is_private(cache_directory()) and any(cache_directory().rglob("*.nbi"))


@cache
def cache_directory() -> Path:
    """A directory named by the sources' digest, below NANOHYBRID_CACHE or the user's cache directory."""
    base = os.environ.get("NANOHYBRID_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(base) if base else user_cache / "nanohybrid"
    package = Path(__file__).parents[2]
    folders = (package / "ops" / "numba", package / "executors" / "cpu" / "kernels")
    sources = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    digest = hashlib.sha256()
    for source in (*sources, package / "ops" / "sizes.py"):
        digest.update(source.read_bytes())
    return root / "kernels" / digest.hexdigest()[:16]
