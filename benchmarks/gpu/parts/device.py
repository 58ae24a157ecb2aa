"""The limits of this machine on random data: the bandwidth of a copy, the rate of a matrix product."""

from collections.abc import Callable
from functools import partial

import torch
from bench import INPUT_SETS, Bench, milliseconds

TITLE = "What this machine can do at best. The rooflines of the other parts use these limits."


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    for what, value in limits(bench.device, bench.toy).items():
        emit({"what": what, "value": value})


def limits(device: torch.device, toy: bool) -> dict[str, float]:
    """Bytes or operations per second, by name; measured now."""
    found = {
        "copy bandwidth, bytes/s": copy_bandwidth(device, 2**22 if toy else 2**32),
        "bf16 product, FLOP/s": product_rate(device, 256 if toy else 8192),
    }
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        found["FP8 product, FLOP/s"] = fp8_rate(device, 1024 if toy else 8192)
    return found


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read plus bytes written."""
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2e3 * size / milliseconds([lambda: target.copy_(source)], device)[0]


def product_rate(device: torch.device, n: int) -> float:
    pairs = [torch.randn(2, n, n, device=device).bfloat16() for _ in range(INPUT_SETS)]
    return 2e3 * n**3 / milliseconds([partial(torch.mm, *pair) for pair in pairs], device)[0]


def fp8_rate(device: torch.device, n: int) -> float:
    """Of torch's product with one scale for each matrix, the simplest one."""
    one = torch.ones((), device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    pairs = [torch.randn(2, n, n, device=device).to(torch.float8_e4m3fn) for _ in range(INPUT_SETS)]
    return 2e3 * n**3 / milliseconds([partial(product, *pair) for pair in pairs], device)[0]
