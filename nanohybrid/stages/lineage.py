"""Where a result came from: the code that made it, and the machine it was made on."""

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
