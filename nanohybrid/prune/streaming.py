"""Whether a model is held whole in memory while it is measured, or read from its checkpoint layer by
layer."""

from __future__ import annotations

from pathlib import Path

import torch

from nanohybrid.checkpoint import load_config
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.free_memory import free_bytes
from nanohybrid.estimate.units import GIB

WORKSPACE_BYTES = GIB
"""For hidden states, logits and the libraries."""
COPIES = 2
"""The base model in fp32, and the candidate that is being evaluated."""


def should_stream(model: Path, stream: bool | None = None, device: str | torch.device = "cpu") -> bool:
    """Whether to read the checkpoint `model` layer by layer.

    stream: the answer where it is not None; else the model is streamed where it and a candidate in fp32 do
    not fit the free memory of the device.
    """
    if stream is not None:
        return stream
    free = free_bytes(device)
    need = COPIES * 4 * Footprint.of(load_config(model)).parameters + WORKSPACE_BYTES
    return free is not None and need > free
