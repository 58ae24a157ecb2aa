"""What a machine's memory and arithmetic give at best: a sum over what no cache holds, and a bf16 product of 2048 x 2048 by 8192."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

STREAM_BYTES = 512 * 2**20
EDGE, OUTPUTS = 2048, 8192


class Machine:
    """The operands, kept between looks: a shared machine's speed drifts, so one look is not enough."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._data = torch.ones(STREAM_BYTES // 4, device=device)
        self._x = torch.randn(EDGE, EDGE, device=device).to(torch.bfloat16)
        self._weight = torch.randn(OUTPUTS, EDGE, device=device).to(torch.bfloat16)

    def rates(self, looks: int, of: Callable[[list[float]], float]) -> tuple[float, float]:
        """Bytes and FLOPs a second, `of` the seconds of so many looks."""
        stream = of([self._seconds(self._data.sum) for _ in range(looks)])
        product = of([self._seconds(lambda: F.linear(self._x, self._weight)) for _ in range(looks)])
        return self._data.nbytes / stream, 2 * self._x.numel() * len(self._weight) / product

    def _seconds(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
