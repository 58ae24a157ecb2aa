"""Reading of regular files, and atomic writes of files and directories: write under a temporary name, flush
to the disk, rename.

The temporary name depends on the target only, so the next writer overwrites the leftovers of a killed one.
"""

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanohybrid.errors import InputError

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content`. A reader sees the old file or the new one."""
    beside = scratch(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill.

    On a clean exit it is renamed to `path`, replacing a directory of that name.
    """
    beside = scratch(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    publish(beside, path)


def publish(directory: Path, path: Path) -> None:
    """Flush all files of `directory` and rename it to `path`, replacing a directory.

    Raises InputError if `path` is a file.
    """
    if path.is_file():
        raise InputError(f"{path} is a file, but a directory is to be written; give another name")
    for folder, _, names in os.walk(directory):
        for name in names:
            flush(Path(folder) / name)
        flush(Path(folder))
    if path.is_dir() and any(path.iterdir()):
        exchange(directory, path)
        shutil.rmtree(directory)
    else:
        os.rename(directory, path)
    flush(path.parent)


def scratch(path: Path) -> Path:
    """The temporary name for writing `path`, in the same directory."""
    return path.with_name(f".{path.name}.writing")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading without a buffer.

    Raises OSError, also for a pipe, a device and a directory, which untrusted directories may hold and which
    could be read for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb", buffering=0)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError where it is none or has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, at most {most:,} are read", str(path))
        parts, left = [], most + 1  # one more, since it may be growing
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
    return b"".join(parts)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Swap the names of two directories: atomically on Linux, else with three renames."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if (
        rename is not None
        and rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
    ):
        return
    aside = second.with_name(f".{second.name}.replaced")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def cache_directory() -> Path:
    """The directory of caches: NANOHYBRID_CACHE, else `nanohybrid` in the user's cache directory.

    Raises OSError where the user has no home directory.
    """
    base = os.environ.get("NANOHYBRID_CACHE")
    if base:
        return Path(base)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanohybrid"
    except RuntimeError as error:  # of Path.home
        raise OSError(str(error)) from None
