"""Measured peak rates of this machine: memory bandwidth, and bf16 matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

STREAM_BYTES = 512 * 2**20
EDGE, OUTPUTS = 2048, 8192


class Machine:
    """Holds the operands, so that rates can be measured often. The speed of a shared machine drifts."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._data = torch.ones(STREAM_BYTES // 4, device=device)
        self._x = torch.randn(EDGE, EDGE, device=device).to(torch.bfloat16)
        self._weight = torch.randn(OUTPUTS, EDGE, device=device).to(torch.bfloat16)

    def rates(self, samples: int, reduce: Callable[[list[float]], float]) -> tuple[float, float]:
        """Bytes/s and FLOP/s, from `reduce` of the seconds of `samples` measurements each."""
        stream = reduce([self._seconds(self._data.sum) for _ in range(samples)])
        product = reduce([self._seconds(lambda: F.linear(self._x, self._weight)) for _ in range(samples)])
        return self._data.nbytes / stream, 2 * self._x.numel() * len(self._weight) / product

    def _seconds(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
