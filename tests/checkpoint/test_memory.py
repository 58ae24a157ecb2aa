"""Host memory while a checkpoint is loaded or saved: the weights and little else."""

import json
import os
import subprocess
import sys

import pytest

import nanohybrid

MEASURE = """
import json, sys, torch
from pathlib import Path
from nanohybrid.checkpoint import load, save
from nanohybrid.config import HybridConfig
from nanohybrid.model import HybridLM
from nanohybrid.executors.cpu.weights import prepare

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def forget():
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

directory = Path(sys.argv[1])
if not directory.exists():
    model = HybridLM(HybridConfig(**json.loads(sys.argv[2])), seed=0)
    forget(); begin = peak(); save(model, directory, max_shard_bytes=60_000_000)
else:
    load(Path(sys.argv[3]))  # warm up what the first load imports
    load(Path(sys.argv[3]), quantize="int4")
    prepare(HybridLM(nanohybrid.preset("tiny")).bfloat16())
    forget(); begin = peak()
    model = load(directory, dtype=getattr(torch, sys.argv[2]), quantize=sys.argv[4] or None)
    packed = "pack" in sys.argv and prepare(model)
weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
print(json.dumps([peak() - begin, weights]))
"""

RETURNED = {
    "MALLOC_MMAP_THRESHOLD_": "1000000"
}  # glibc gives what is freed back, so that the peak is what was held


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_load_and_save_need_little_memory_beside_the_weights(tmp_path, good):
    shape = dict(
        nanohybrid.preset("tiny").__dict__,
        hidden_size=1024,
        intermediate_size=4096,
        vocab_size=16_384,
        pattern="M-*-" * 3,
    )
    shape["time_step_limit"] = [0.0, 1e9]

    def measure(*arguments):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), *arguments]
        run = subprocess.run(command, capture_output=True, check=True, env=os.environ | RETURNED)
        return json.loads(run.stdout)

    grown, weights = measure(json.dumps(shape))
    assert weights > 300e6 and grown < 30e6  # saving adds nothing but a cast of one tensor
    for dtype, width in (("float32", 1.0), ("bfloat16", 0.5)):
        grown, loaded = measure(dtype, str(good), "")
        assert loaded == weights * width and grown < loaded + 40e6, (dtype, grown / 1e6, loaded / 1e6)
    for format in ("int8", "int4", "fp8"):
        grown, loaded = measure("bfloat16", str(good), format)
        assert loaded < weights * 0.36 and grown < loaded + 40e6, (format, grown / 1e6, loaded / 1e6)
        packed, _ = measure("bfloat16", str(good), format, "pack")
        assert packed < loaded + 0.1 * weights, (format, packed / 1e6, loaded / 1e6)
