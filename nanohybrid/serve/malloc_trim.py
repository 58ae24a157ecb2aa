"""Memory that was freed, given back to the system now and then.

The prefix cache copies and drops pieces of some KiB all the time, between the large buffers of the steps; glibc keeps the holes. In a
soak of `tiny` resident memory went on growing by some MiB a minute beyond what was held, which a memory plan cannot promise away.
"""

import ctypes
import platform
import time

SECONDS = 10.0  # between two times: a call takes about a millisecond for each GiB of heap


class Trim:
    """Call it as often as you like; it does something every ten seconds, and nothing where there is no glibc."""

    def __init__(self) -> None:
        self._trim = ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None
        self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._trim is not None and now - self._last > SECONDS:
            self._last = now
            self._trim(0)
