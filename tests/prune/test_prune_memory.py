"""Pruning from disk to disk holds a tensor and its part, never the model."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import nanohybrid
from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter
from nanohybrid.data import TokenStore
from nanohybrid.estimate import Footprint
from nanohybrid.model.spec import param_specs
from nanohybrid.prune.baselines import random
from nanohybrid.prune.depth_rule import layers_to_drop

TWELVE = nanohybrid.preset("nano-12b-v2")
SCALED = TWELVE.replace(
    vocab_size=16_384,
    hidden_size=640,
    intermediate_size=4096,
    mamba_head_dim=40,
    num_attention_heads=8,
    head_dim=64,
)
MIB = 2**20
LARGEST = SCALED.vocab_size * SCALED.hidden_size * 2
MEASURE = """
import sys
from nanohybrid.cli.main import main
import nanohybrid.prune.stage, nanohybrid.stages.report, torch

def peak():  # not getrusage, whose peak a process inherits from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
code = main(sys.argv[1:])
print(peak() - before)
sys.exit(code)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in KiB, as Linux gives it"),
]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """More than 500 MiB of weights."""
    directory = tmp_path_factory.mktemp("streams")
    assert Footprint.of(SCALED).weight_bytes > 500 * MIB
    write_parent(directory / "parent")
    write_scores(directory)
    rng = np.random.default_rng(0)
    documents = [
        (rng.integers(13, 16_000, 64).astype(np.int32), np.ones(64, dtype=np.uint8)) for _ in range(4)
    ]
    TokenStore.from_documents(documents).write(directory / "stores" / "documents.safetensors")
    return directory


def test_prune_command_peak_memory_is_far_below_the_weights(parent, tmp_path):
    drop = ",".join(map(str, layers_to_drop(SCALED.pattern, 56)))
    sizes = ["--hidden-size", "560", "--intermediate-size", "3136", "--drop-layers", drop]
    peak = peak_of("prune", parent / "parent", "--out", tmp_path / "out", "--importance", parent, *sizes)
    assert peak < 4 * LARGEST + 60 * MIB < Footprint.of(SCALED).weight_bytes / 3
    with CheckpointReader(tmp_path / "out") as reader:
        nine = nanohybrid.preset("nano-9b-v2")
        assert (reader.config.pattern, reader.config.hidden_size, reader.config.intermediate_size) == (
            nine.pattern,
            560,
            3136,
        )


def test_importance_peak_memory_is_far_below_the_weights(parent, tmp_path):
    peak = peak_of(
        "prune", parent / "parent", "--out", tmp_path / "out", "--calibration", parent, "--hidden-size", "560"
    )
    assert peak < Footprint.of(SCALED, torch.float32).weight_bytes / 4


def peak_of(*command):
    """Bytes that a command holds at most, beyond the libraries it loads."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.splitlines()[-1]) * 1024


def write_parent(directory):
    """A parent of zeros, written as it will be read: tensor by tensor."""

    with CheckpointWriter(directory, SCALED, torch.bfloat16, max_shard_bytes=200 * MIB) as writer:
        for name, declared in param_specs(SCALED).items():
            writer.write(name, torch.zeros(declared.shape, dtype=torch.bfloat16))


def write_scores(directory):
    """Random scores of the parent's shape."""
    random(SCALED, 0).save(directory)
