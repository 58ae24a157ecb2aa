"""Every kernel and every gradient against float64. The cases are benchmarks/gpu/cases.py."""

from collections.abc import Callable

import torch
from bench import Bench
from cases import cases, errors

TITLE = "Relative error of the worst output or gradient against float64, in the norm."


def run(bench: Bench, emit: Callable[[dict], None]) -> None:
    torch.manual_seed(0)
    with torch.device(bench.device):
        check_all(bench.toy, emit)


def check_all(toy: bool, emit: Callable[[dict], None]) -> None:
    for case in cases(toy):
        for dtype, allowed in case.tolerance.items():
            row = {"case": case.name, "inputs": str(dtype).removeprefix("torch."), "allowed": allowed}
            try:
                found = errors(case, dtype)
            except Exception as error:  # noqa: BLE001  a kernel that does not compile or run is a result too
                message = str(error)[:300].replace("\n", " ")
                emit(row | {"worst": type(error).__name__, "passed": False, "message": message})
                continue
            worst = max(found, key=lambda name: found[name])
            emit(row | {"worst": worst, "error": found[worst], "passed": found[worst] <= allowed})
