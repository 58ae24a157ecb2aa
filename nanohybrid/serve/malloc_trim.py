"""Returns freed memory to the operating system every ten seconds (glibc's `malloc_trim`).

The prefix cache allocates and frees pieces of a few KiB all the time, between the large buffers of the steps,
and glibc does not return the holes by itself. In a soak test of the preset `tiny`, resident memory grew by
some MiB a minute beyond what was in use, which no memory plan can account for.
"""

import ctypes
import platform
import time

SECONDS = 10.0  # between two calls: one takes about a millisecond for each GiB of heap


class MallocTrim:
    """May be called after every step: it trims every ten seconds, and does nothing without glibc."""

    def __init__(self) -> None:
        self._trim = ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None
        self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._trim is not None and now - self._last > SECONDS:
            self._last = now
            self._trim(0)
