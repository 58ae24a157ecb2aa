"""What the parts share: the machine's two ceilings, sizes, and a clock.

A floor is the larger of two times: bytes that must move over the measured copy bandwidth, and operations over
the measured rate of matrix products. Inputs are random, several sets of them in turn, so that the cache of
one run does not serve the next."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

SETS = 3  # of inputs
RUNS, SECONDS = 30, 0.4  # of a measurement, at most


@dataclass(frozen=True)
class Bench:
    """bandwidth in bytes/s, bf16 and fp8 in operations/s (None where there is no such product); toy: sizes
    that a CPU can do.
    """

    device: torch.device
    toy: bool
    bandwidth: float
    bf16: float
    fp8: float | None

    @classmethod
    def at(cls, out: Path, toy: bool) -> Bench:
        """With the ceilings that the part `device` measured, or measured now where it did not run."""
        from parts import device

        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        file = out / "device.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        found = {row["what"]: row["value"] for row in rows}
        if not {"copy bandwidth, bytes/s", "bf16 product, FLOP/s"} <= set(found):
            found = {what: measured() for what, measured in device.ceilings(where, toy).items()}
        return cls(
            where,
            toy,
            found["copy bandwidth, bytes/s"],
            found["bf16 product, FLOP/s"],
            found.get("FP8 product, FLOP/s"),
        )

    def floor(self, bytes_moved: float, operations: float = 0.0, fp8: bool = False) -> tuple[float, str]:
        """Milliseconds, and which of the two it is."""
        rate = self.fp8 if fp8 and self.fp8 else self.bf16
        moving, computing = 1e3 * bytes_moved / self.bandwidth, 1e3 * operations / rate
        return (moving, "bytes") if moving >= computing else (computing, "operations")


def milliseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, float, float]:
    """Median, least and most of a call, by CUDA events (a clock on a CPU), the calls taking turns. The first
    round warms up.
    """
    for call in calls:
        call()
    times: list[float] = []
    wait(device)
    end = time.perf_counter() + SECONDS
    while len(times) < RUNS and (len(times) < 3 or time.perf_counter() < end):
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
    if device.type == "cuda":
        torch.cuda.synchronize()
