"""A cache on disk of the SHA-256 of files, so a checkpoint of 20 GB is hashed once and not by every command.

An entry is valid while size, modification time, change time, inode and device of the file are unchanged. A
file that changed within SETTLED_SECONDS before it was hashed gets no entry, because a later change could
leave it with the same times (the index of git has the same rule: "racy git").
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

from nanohybrid.files import cache_directory

FILE = "sha256.json"
SETTLED_SECONDS = 3.0
"""Longer than the coarsest timestamps of a file system (FAT: 2 s)."""
MAX_ENTRIES = 8192
SAVE_SECONDS = 30.0
"""Hashing time that a killed process may lose."""


class Identity(NamedTuple):
    """Attributes of a file that change with its content. Times are in ns since 1970."""

    size: int
    modified: int
    changed: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: Path) -> Self:
        """The current identity of a file; symbolic links are followed."""
        stat = os.stat(file)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)

    def same_content(self, other: "Identity") -> bool:
        """Whether nothing was written between the two.

        The change time does not count: a new hard link changes it too.
        """
        return self._replace(changed=0) == other._replace(changed=0)


class HashCache:
    """Entries in one file: path -> (identity, SHA-256 in hex), oldest first.

    A cache file that is missing, damaged or read-only is no error; files are then hashed again. `None`: no
    cache file.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._stored = self._read()
        self._new: dict[str, tuple[Identity, str]] = {}
        self._saved = time.monotonic()

    @classmethod
    def of_user(cls) -> Self:
        """The cache file in the user's cache directory."""
        try:
            return cls(cache_directory() / FILE)
        except OSError:
            return cls(None)

    def find(self, file: Path, now: Identity) -> str | None:
        """The cached SHA-256 of a file whose identity is `now`, or None."""
        known = self._stored.get(os.path.realpath(file))
        return known[1] if known is not None and known[0] == now else None

    def add(self, file: Path, before: Identity, digest: str, began: float) -> None:
        """Cache the SHA-256 of a file that had the identity `before` when hashing started, at `began` seconds
        since 1970."""
        if max(before.modified, before.changed) < (began - SETTLED_SECONDS) * 1e9:
            self._new[os.path.realpath(file)] = before, digest
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the new entries to the file, together with those that other processes have written.

        Beyond MAX_ENTRIES the oldest are dropped. If two processes save at the same moment, the entries of
        one may be missing until it saves again.
        """
        self._saved = time.monotonic()
        if not self._new or self.file is None:
            return
        entries = {
            path: entry for path, entry in (self._stored | self._read()).items() if path not in self._new
        } | self._new
        self._stored, self._new = dict(list(entries.items())[-MAX_ENTRIES:]), {}
        with contextlib.suppress(
            OSError
        ):  # a full disk, a home that may not be written: the next run hashes again
            self.file.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.file, json.dumps(self._stored))

    def _read(self) -> dict[str, tuple[Identity, str]]:
        try:
            raw = {} if self.file is None else json.loads(self.file.read_bytes())
            return {path: _entry(value) for path, value in raw.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}


def _entry(value: Any) -> tuple[Identity, str]:
    """Parse an entry of the file. Raises ValueError or TypeError for a bad one."""
    numbers, digest = value
    if len(bytes.fromhex(digest)) != 32:
        raise ValueError("not a SHA-256")
    return Identity(*(int(number) for number in numbers)), digest


def _replace(file: Path, content: str) -> None:
    """Replace a file atomically, through a temporary name that no other process uses."""
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(content)
        os.replace(beside, file)
    except BaseException:
        os.unlink(beside)
        raise
