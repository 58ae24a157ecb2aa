"""What a kernel computes does not hang on whether this process compiled it, nor on which other kernels came first."""

import os
import subprocess
import sys

import pytest

from nanohybrid.ops.cpu import available

pytestmark = pytest.mark.skipif(not available(), reason="numba is not installed")

SCRIPT = """
import sys, torch
from nanohybrid.ops.gated_norm import gated_norm
from nanohybrid.ops.losses.compiled import cross_entropy
from nanohybrid.ops.cpu import team

team.threads = lambda _: 1
torch.manual_seed(0)
y, z, weight, logits = torch.randn(9, 48), torch.randn(9, 48), torch.randn(48), torch.randn(9, 300)

def norm():
    leaves = [one.clone().requires_grad_() for one in (y, z, weight)]
    out = gated_norm(*leaves, 2, 1e-5)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]

def loss():
    return cross_entropy(logits.clone(), torch.arange(9), True)

parts = {"norm": norm, "loss": loss}
found = {name: parts[name]() for name in sys.argv[1:]}
print({name: [one.double().sum().item().hex() for one in found[name]] for name in sorted(found)})
"""


def test_compiled_read_from_disk_and_in_another_order(tmp_path):
    def bits(*order):
        environment = os.environ | {"NANOHYBRID_CACHE": str(tmp_path), "NANOHYBRID_KERNELS": "numba"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *order], capture_output=True, text=True, timeout=300, env=environment, check=True
        )
        return done.stdout

    compiled_here = bits("norm", "loss")
    assert bits("norm", "loss") == bits("loss", "norm") == compiled_here
