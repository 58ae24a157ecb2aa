"""What the parts share: the machine's two limits (its roofline), sizes, and a timer.

The roofline of a measurement is the larger of two times: its bytes at the measured copy bandwidth, and its
operations at the measured rate of matrix products. Inputs are random, and several sets of them take turns, so
the cache of one run does not help the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

INPUT_SETS = 3
MAX_RUNS, MAX_SECONDS = 30, 0.4  # of a measurement


@dataclass(frozen=True)
class Bench:
    """bandwidth in bytes/s; bf16 and fp8 (None without such a product) in operations/s; toy: CPU sizes."""

    device: torch.device
    toy: bool
    bandwidth: float
    bf16: float
    fp8: float | None

    @classmethod
    def at(cls, out: Path, toy: bool, limits: Callable[[torch.device, bool], dict[str, float]]) -> Bench:
        """With the limits that the part `device` has written to `out`, else those that `limits` measures
        now.
        """
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        file = out / "device.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        found = {row["what"]: row["value"] for row in rows}
        if not {"copy bandwidth, bytes/s", "bf16 product, FLOP/s"} <= set(found):
            found = limits(where, toy)
        return cls(
            where,
            toy,
            found["copy bandwidth, bytes/s"],
            found["bf16 product, FLOP/s"],
            found.get("FP8 product, FLOP/s"),
        )

    def roofline(self, bytes_moved: float, operations: float = 0.0, fp8: bool = False) -> tuple[float, str]:
        """The least possible milliseconds, and which of the two limits they come from."""
        rate = self.fp8 if fp8 and self.fp8 else self.bf16
        moving, computing = 1e3 * bytes_moved / self.bandwidth, 1e3 * operations / rate
        return (moving, "bytes") if moving >= computing else (computing, "operations")


def milliseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, float, float]:
    """Median, minimum and maximum of a call, by CUDA events; on a CPU by a clock."""
    for call in calls:
        call()
    times: list[float] = []
    wait(device)
    end = time.perf_counter() + MAX_SECONDS
    while len(times) < MAX_RUNS and (len(times) < 3 or time.perf_counter() < end):
        times.append(_once(calls[len(times) % len(calls)], device))
    return median(times), min(times), max(times)


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
