"""Devices as data, so that a plan can be made for a machine that is not present.

Memory is what a program can use. Bandwidth and bf16 FLOP/s are from data sheets (dense, without sparsity), so
speed estimates are upper bounds.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

from nanohybrid.errors import InputError
from nanohybrid.estimate.units import GIB

FRAMEWORK = 0.05  # share of memory for CUDA context, allocator and graphs, as in the paper


@dataclass(frozen=True)
class Device:
    """A device: usable memory in bytes, memory bandwidth in bytes/s, and bf16 FLOP/s."""

    name: str
    memory: int
    bandwidth: float
    flops: float
    framework: float = FRAMEWORK

    def budget(self, beside: int = 0) -> int:
        """Bytes for a model: the memory less the framework's share and `beside` bytes for other programs.

        The paper's: 22.06 GiB x 0.95 - 1.3 GiB for a vision encoder = 19.66 GiB on an A10G.
        """
        return int(self.memory * (1 - self.framework)) - beside


def _host() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


DEVICES = {
    device.name: device
    for device in (
        Device("a10g", int(22.06 * GIB), 600e9, 70e12),  # 22.06: the paper's
        Device("l4", int(22.06 * GIB), 300e9, 121e12),
        Device("rtx4090", int(23.64 * GIB), 1008e9, 165e12),
        Device("h100", int(79.2 * GIB), 3.35e12, 989e12),
        Device("h200", int(139.8 * GIB), 4.8e12, 989e12),
        Device("cpu", _host(), 20e9, 0.1e12),  # this machine's memory; nominal rates of two cores
    )
}


def device(name: str) -> Device:
    """The device called `name`. Raises InputError that lists the known ones."""
    if name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f", nearest {near[0]}" if near else ""
        raise InputError(
            f'no device is called "{name}"{hint}; known are {", ".join(DEVICES)}, or give --budget-gib alone'
        )
    return DEVICES[name]
