"""A kernel's results do not depend on whether it was compiled here or read from the cache, on the order, or
on freed memory.
"""

import os
import subprocess
import sys

import pytest

from nanohybrid.ops.numba import available

pytestmark = pytest.mark.skipif(not available(), reason="numba is not installed")

SCRIPT = """
import sys, torch
from nanohybrid.ops.gated_norm import gated_norm
from nanohybrid.ops.losses.numba import cross_entropy
from nanohybrid.ops.numba import threads

threads.num_threads = lambda _: 1
torch.manual_seed(0)
y, z, weight = torch.randn(9, WIDTH), torch.randn(9, WIDTH), torch.randn(WIDTH)
logits = torch.randn(9, VOCABULARY)

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


def test_kernels_give_the_same_bits_compiled_cached_and_in_another_order(tmp_path):
    def bits(*order):
        return run(tmp_path, 48, 300, *order)

    compiled_here = bits("norm", "loss")
    assert bits("norm", "loss") == bits("loss", "norm") == compiled_here


def test_kernels_keep_their_scratch_alive_while_they_use_its_address(tmp_path):
    """glibc returns every larger block to the system at once, so a use after free crashes. Asserts by not
    raising.
    """
    assert run(tmp_path, 24_000, 70_000, "norm", "loss", MALLOC_MMAP_THRESHOLD_="65536")


def run(cache, width, vocabulary, *order, **environment):
    script = SCRIPT.replace("WIDTH", str(width)).replace("VOCABULARY", str(vocabulary))
    environment = os.environ | {"NANOHYBRID_CACHE": str(cache), "NANOHYBRID_KERNELS": "numba"} | environment
    done = subprocess.run(
        [sys.executable, "-c", script, *order],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=True,
    )
    return done.stdout
