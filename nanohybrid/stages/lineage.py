"""The lineage of a result: the code and the machine that made it."""

import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nanohybrid.version import VERSION

LINEAGE = "lineage.json"


@cache
def made_with() -> dict[str, Any]:
    """Version, git commit, Python and torch versions, operating system and number of cores."""
    return {
        "version": VERSION,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+changes` for modified files; None if it
    is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # git is missing or may not read this checkout; the version must do


def git(root: Path, *arguments: str) -> str:
    """The output of a git command."""
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def machine_memory_bytes() -> int:
    """Total memory of this machine in bytes, used or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
