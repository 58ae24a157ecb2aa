"""Every kernel compiles for Hopper, with tensor cores where it multiplies and without spilling. Needs no
GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

MULTIPLY = {
    *("chunk_state", "bmm_chunk", "chunk_scan"),  # the scan
    *("chunk_state_gradients", "score_gradients", "group_gradients", "input_gradients"),  # its gradient
    *("part", "queries"),  # attention over pages
    *("product_kernel", "_bytes", "_nibbles"),  # quantized operands
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1"
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("hopper.py")],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(root)},
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict] = {}
    for line in done.stdout.splitlines():
        kernel = json.loads(line)
        worst = found.setdefault(kernel["kernel"], kernel)
        worst["spilled"] = max(worst["spilled"], kernel["spilled"])
    return found


def test_triton_products_use_tensor_cores(compiled):
    assert {name for name, kernel in compiled.items() if kernel["tensor_cores"]} == MULTIPLY


def test_triton_kernels_do_not_spill_registers(compiled):
    assert {name: kernel["spilled"] for name, kernel in compiled.items() if kernel["spilled"] > 64} == {}


def test_triton_kernels_fit_the_shared_memory_of_a_multiprocessor(compiled):
    assert len(compiled) > 25 and all(kernel["shared"] <= 227 * 1024 for kernel in compiled.values())
