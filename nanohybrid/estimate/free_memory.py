"""What memory is free, and one line where a model has no room in it: the system would end the process without one."""

from __future__ import annotations

from pathlib import Path

import torch

from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.footprint import Footprint
from nanohybrid.estimate.units import GIB
from nanohybrid.ops.quantized import FORMATS

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(device: str | torch.device = "cpu") -> int | None:
    """Memory that a process may still take on a device: of a GPU what its driver says is free, and what torch keeps of it unused; else
    what the system says is available, and within its cgroup, whose copies of files are given up when they must; None where nobody says.
    """
    if torch.device(device).type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    found = []
    if (available := meminfo("MemAvailable")) is not None:
        found.append(available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append(max(0, int(limit.read_text()) - int(used.read_text()) + _files()))
    return min(found) if found else None


def meminfo(name: str) -> int | None:
    """One of the system's numbers, in bytes; None where it has none."""
    rows = (
        dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        if MEMINFO.is_file()
        else {}
    )
    return 1024 * int(rows[name].split()[0]) if name in rows else None


def _files() -> int:
    """Bytes of a cgroup that are copies of files."""
    stat = CGROUP / "memory.stat"
    rows = (
        dict(line.split() for line in stat.read_text().splitlines() if len(line.split()) == 2)
        if stat.is_file()
        else {}
    )
    return sum(int(rows.get(name, 0)) for name in ("inactive_file", "active_file"))


def check_room(config: HybridConfig, held: int, device: str | torch.device) -> None:
    """Raise InputError where a model's weights, of so many bytes, exceed what is free on a device, and on the disk to swap to.

    Of a model that fits nothing is said: what it needs beside its weights depends on what it is to do.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda") or (free := free_bytes(device)) is None:
        return
    if held <= free + ((meminfo("SwapFree") or 0) if kind == "cpu" else 0):
        return
    forms = {"bf16": None, **{name: name for name in FORMATS}}
    sizes = {
        name: Footprint.of(config, torch.bfloat16, format=format).weight_bytes
        for name, format in forms.items()
    }
    fit = [f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size < min(held, free)]
    mend = (
        f"as {', '.join(fit)} GiB it would have room"
        if fit
        else "no form of it has room: it needs more memory, or a smaller model"
    )
    where = "memory" if kind == "cpu" else "the GPU's memory"
    raise InputError(
        f"the weights take {held / GIB:.2f} GiB, and {free / GIB:.2f} GiB of {where} are free; {mend}"
    )
