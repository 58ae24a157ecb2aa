"""On a GPU: every kernel and every gradient by name against float64, over many shapes.

The cases are those of benchmarks/gpu/cases.py.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu


def load_cases():
    path = Path(__file__).parents[2] / "benchmarks/gpu/cases.py"
    spec = importlib.util.spec_from_file_location("gpu_cases", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["scans", "convolutions", "norms", "heads", "linears", "attentions"])
def test_kernels_and_gradients_equal_float64_on_a_gpu(family):
    module = load_cases()
    wrong = []
    with torch.device("cuda"):
        for case in getattr(module, family)(toy=False):
            for dtype, allowed in case.tolerance.items():
                found = module.errors(case, dtype)
                wrong += [
                    f"{case.name}, {dtype}, {name}: {error:.3g}"
                    for name, error in found.items()
                    if not error <= allowed
                ]
    assert not wrong, "\n".join(wrong)
