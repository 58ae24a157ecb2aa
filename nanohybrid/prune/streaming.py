"""Whether a model may be held whole where it is measured, or is to be read layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from nanohybrid.checkpoint import load_config
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.free_memory import free_bytes

BESIDE = 2**30  # bytes for hidden states, logits and the libraries
COPIES = 2  # the parent in fp32, and the shape that is being tried


def streams(model: Path, wanted: bool | None = None, device: str | torch.device = "cpu") -> bool:
    """Whether to read the checkpoint layer by layer: as it is wanted, else where what is measured on it in fp32 has no room whole."""
    if wanted is not None:
        return wanted
    free = free_bytes(device)
    return free is not None and COPIES * 4 * Footprint.of(load_config(model)).parameters + BESIDE > free
