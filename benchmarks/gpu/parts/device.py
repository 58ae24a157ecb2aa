"""The two ceilings of this machine: what a copy moves, and what a product of matrices computes, on random
data.
"""

from collections.abc import Callable
from functools import partial

import torch
from bench import SETS, Bench, milliseconds

TITLE = "What this machine can do at best: floors are made of these."


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    for what, measured in ceilings(bench.device, bench.toy).items():
        emit({"what": what, "value": measured()})


def ceilings(device: torch.device, toy: bool) -> dict[str, Callable[[], float]]:
    found = {
        "copy bandwidth, bytes/s": partial(copy_bandwidth, device, 2**22 if toy else 2**32),
        "bf16 product, FLOP/s": partial(product_rate, device, 256 if toy else 8192),
    }
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        found["FP8 product, FLOP/s"] = partial(fp8_rate, device, 1024 if toy else 8192)
    return found


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read plus bytes written."""
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2e3 * size / milliseconds([lambda: target.copy_(source)], device)[0]


def product_rate(device: torch.device, n: int) -> float:
    pairs = [torch.randn(2, n, n, device=device).bfloat16() for _ in range(SETS)]
    return 2e3 * n**3 / milliseconds([partial(torch.mm, *pair) for pair in pairs], device)[0]


def fp8_rate(device: torch.device, n: int) -> float:
    """Of torch's product with one scale for each matrix: the plainest there is."""
    one = torch.ones((), device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    pairs = [torch.randn(2, n, n, device=device).to(torch.float8_e4m3fn) for _ in range(SETS)]
    return 2e3 * n**3 / milliseconds([partial(product, *pair) for pair in pairs], device)[0]
