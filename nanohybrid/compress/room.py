"""Whether a model may be held whole where it is measured, or is to be read layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from nanohybrid.checkpoint import read_config
from nanohybrid.model import Footprint

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
BESIDE = 2**30  # bytes for hidden states, logits and the libraries
COPIES = 2  # the parent in fp32, and the shape that is being tried


def free_bytes(device: str | torch.device = "cpu") -> int | None:
    """Memory that a process may still take on a device: of a GPU what its driver says is free, and what torch keeps of it unused; else
    what the system says is available, and within its cgroup; None where nobody says.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    if MEMINFO.is_file():
        rows = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        if "MemAvailable" in rows:
            found.append(1024 * int(rows["MemAvailable"].split()[0]))
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(found) if found else None


def streams(model: Path, wanted: bool | None = None, device: str | torch.device = "cpu") -> bool:
    """Whether to read the checkpoint layer by layer: as it is wanted, else where what is measured on it in fp32 has no room whole."""
    if wanted is not None:
        return wanted
    free = free_bytes(device)
    return free is not None and COPIES * 4 * Footprint.of(read_config(model)).parameters + BESIDE > free
