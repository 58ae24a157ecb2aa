"""Where a result came from: hashes of its inputs, the code that made it, the machine it was made on."""

import hashlib
import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nanohybrid.errors import InputError
from nanohybrid.version import VERSION

LINEAGE = "lineage.json"
WHOLE_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16


def fingerprint(path: Path) -> str:
    """A hash that tells one input from another without reading gigabytes.

    A directory that a stage made is its lineage file. Of anything else: names, sizes, and contents; of files above
    1 MiB only the first and last 64 KiB count. The place of the input on the disk does not count.
    """
    digest = hashlib.sha256()
    if (path / LINEAGE).is_file():
        digest.update((path / LINEAGE).read_bytes())
    elif path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
            add_file(digest, file)
    elif path.is_file():
        add_file(digest, path)
    else:
        raise InputError(f"{path}: there is no such file or directory")
    return digest.hexdigest()


def add_file(digest: "hashlib._Hash", file: Path) -> None:
    """Add a file's size and contents (of a large one, its two ends) to a hash."""
    size = file.stat().st_size
    digest.update(f"{size}\0".encode())
    with open(file, "rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
        else:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(-SAMPLE_BYTES, os.SEEK_END)
            digest.update(stream.read())


@cache
def made_with() -> dict[str, Any]:
    """The code and the machine: version, git commit in a checkout, Python, torch, system, cores."""
    return {
        "version": VERSION,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+changes` where files differ; None when installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or not one that may read this checkout: the version must do


def git(root: Path, *arguments: str) -> str:
    """What a git command prints."""
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def machine_memory_bytes() -> int:
    """The memory that this machine has, free or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
