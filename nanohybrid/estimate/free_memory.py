"""Free memory, and a one-line error for a model that does not fit.

Without it the system would kill the process.
"""

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
    """Bytes that this process can still allocate on a device; None if the system does not report them.

    On a GPU: the driver's free memory plus what torch has reserved and not used. On a CPU: the smaller of the
    system's available memory and the rest of the cgroup's limit. The cgroup's page cache counts as free,
    since it can be dropped.
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
    """A row of /proc/meminfo, in bytes; None if it is missing."""
    rows = (
        dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        if MEMINFO.is_file()
        else {}
    )
    return 1024 * int(rows[name].split()[0]) if name in rows else None


def _files() -> int:
    """Bytes of the cgroup's page cache."""
    stat = CGROUP / "memory.stat"
    rows = (
        dict(line.split() for line in stat.read_text().splitlines() if len(line.split()) == 2)
        if stat.is_file()
        else {}
    )
    return sum(int(rows.get(name, 0)) for name in ("inactive_file", "active_file"))


def check_memory(config: HybridConfig, held: int, device: str | torch.device) -> None:
    """Raise InputError if weights of `held` bytes exceed the free memory of a device; on a CPU, free swap is
    added.

    Only weights are counted. The other memory of a model depends on the command.
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
    fix = (
        f"it fits as {', '.join(fit)} GiB"
        if fit
        else "it fits in no format; use a machine with more memory, or a smaller model"
    )
    where = "memory" if kind == "cpu" else "the GPU's memory"
    raise InputError(
        f"the weights take {held / GIB:.2f} GiB, and {free / GIB:.2f} GiB of {where} are free; {fix}"
    )
