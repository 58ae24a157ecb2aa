"""A long prompt through one Mamba layer of the 9B, in chunks: the memory that it takes beside weights and
input.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
import torch
import nanohybrid
from nanohybrid.config import HybridConfig
from nanohybrid.model import Layout, HybridCache
from nanohybrid.model.mixers.mamba2 import Mamba2

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

length, step = int(sys.argv[1]), int(sys.argv[2])
config = nanohybrid.preset("nano-9b-v2").replace(pattern="M")
torch.set_default_dtype(torch.bfloat16)
layer = Mamba2(config).requires_grad_(False)
for name, parameter in layer.named_parameters():
    parameter.normal_(0, 0.02)
x = torch.empty(length, config.hidden_size).normal_()
layer.in_proj(x[:16])  # whatever the library sets up at its first product
state = HybridCache.for_context(config, 1, length, torch.bfloat16)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before = status("VmRSS")
with torch.no_grad():
    for begin in range(0, length, step):
        count = min(step, length - begin)
        layer(x[begin : begin + count], Layout.contiguous([count], [begin], [0], length), state.layers[0])
print(status("VmHWM") - before)
"""


def peak(length: int, step: int) -> int:
    """Bytes at the peak beyond weights, state and input."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(length), str(step)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_prompt_of_32k_tokens_through_a_layer_of_the_9b_needs_less_than_a_gib():
    """Measured: see docs/ops.md."""
    short, long = peak(4096, 2048), peak(32_768, 2048)
    assert long < 2**30
    assert long < 1.1 * short + 2**24  # eight times the length, the same memory
