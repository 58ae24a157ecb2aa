"""The SHA-256 of all bytes of a stage's input."""

import hashlib
import time
from pathlib import Path

from nanohybrid.errors import InputError
from nanohybrid.stages.hash_cache import HashCache, Identity
from nanohybrid.stages.progress import Progress, progress

PREFIX = "sha256:"
"""Prefix of a fingerprint. Older versions had none, and hashed only both ends of a large file."""
CHUNK_BYTES = 1 << 20
CACHED_BYTES = 1 << 20
"""Smaller files are not cached, because hashing them is faster than a lookup."""
SHOWN_BYTES = 1 << 29
"""Number of bytes to hash from which progress is shown."""


def fingerprint(path: Path, cache: HashCache | None = None) -> str:
    """`sha256:` and the SHA-256, in hex, of a file's contents or of a directory's file names and contents.

    The location of the path does not count. Hashes of large files are cached in `cache`, by default that of
    the user. Raises InputError where there is no such path, or a file changes while it is read.
    """
    cache = HashCache.of_user() if cache is None else cache
    if path.is_file():
        return PREFIX + _digests([path], path.name, cache)[0]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    names = sorted(files)
    whole = hashlib.sha256()
    for name, digest in zip(
        names, _digests([files[name] for name in names], path.resolve().name, cache), strict=True
    ):
        whole.update(f"{name}\0{digest}\0".encode("utf-8", "surrogateescape"))
    return PREFIX + whole.hexdigest()


def covers_whole_input(stored: object) -> bool:
    """Whether a stored fingerprint is of all bytes of the input, which was not so in older versions."""
    return isinstance(stored, str) and stored.startswith(PREFIX)


def _digests(files: list[Path], name: str, cache: HashCache) -> list[str]:
    """The SHA-256 of each file in hex, from the cache if possible; `name` is shown with the progress."""
    identities = [Identity.of(file) for file in files]
    found = [
        cache.find(file, now) if now.size >= CACHED_BYTES else None
        for file, now in zip(files, identities, strict=True)
    ]
    todo = zip(files, identities, found, strict=True)
    total = sum(now.size for now, digest in zip(identities, found, strict=True) if digest is None)
    try:
        if total < SHOWN_BYTES:
            return [digest or _sha256(file, now, cache) for file, now, digest in todo]
        with progress(f"hash {name}", total, "B") as bar:
            return [digest or _sha256(file, now, cache, bar) for file, now, digest in todo]
    finally:
        cache.save()


def _sha256(file: Path, before: Identity, cache: HashCache, bar: Progress | None = None) -> str:
    """The SHA-256 of a file that has the identity `before`."""
    digest, buffer, began = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES)), time.time()
    with open(file, "rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            if bar is not None:
                bar.advance(size)
    if not before.same_content(Identity.of(file)):
        raise InputError(f"{file}: changed while it was read; wait until nothing writes to it")
    if before.size >= CACHED_BYTES:
        cache.add(file, before, digest.hexdigest(), began)
    return digest.hexdigest()
