"""Writing that a kill cannot cut in half: write beside, flush to the disk, rename.

The temporary name depends only on the target, so what a killed writer left behind is overwritten by the next one.
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanohybrid.errors import InputError

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content`: a reader sees the old file or the new one, never a part."""
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
    """Yield an empty directory to fill; on a clean exit it takes the name `path`, replacing what had it."""
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
    """Flush every file of `directory` to the disk and give it the name `path`, replacing a directory of that name."""
    if path.is_file():
        raise InputError(f"{path} is a file, and a directory is to be written there: give another name")
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
    """The name beside `path` under which its next content is written."""
    return path.with_name(f".{path.name}.writing")


def flush(path: Path) -> None:
    """Have the operating system put a file, or a directory's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Swap the names of two directories; in one step where the system can (Linux), else in three."""
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
    """Where what can be computed again is stored: NANOHYBRID_CACHE, else `nanohybrid` in the user's cache directory.

    Raises OSError where the user has no home directory.
    """
    base = os.environ.get("NANOHYBRID_CACHE")
    if base:
        return Path(base)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanohybrid"
    except RuntimeError as error:  # of Path.home
        raise OSError(str(error)) from None
