"""Pruning from disk to disk holds a tensor and its part, never the model."""

import subprocess
import sys

import pytest
import torch

from nanohybrid.checkpoint import CheckpointReader, CheckpointWriter
from nanohybrid.compress.depth import layers_to_drop
from nanohybrid.compress.importance import Importance
from nanohybrid.config import HybridConfig
from nanohybrid.model import Footprint

TWELVE = HybridConfig.preset("nano-12b-v2")
SCALED = TWELVE.replace(vocab_size=16_384, hidden_size=640, intermediate_size=4096, mamba_head_dim=40, num_attention_heads=8, head_dim=64)
MIB = 2**20
MEASURE = """
import resource, sys
from nanohybrid.cli.main import main
import nanohybrid.compress.prune_stage, nanohybrid.stages.report, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in KiB, as Linux gives it")
def test_the_peak_is_far_below_the_weights(tmp_path):
    weights = Footprint.of(SCALED).weight_bytes
    write_parent(tmp_path / "parent")
    write_scores(tmp_path)
    drop = ",".join(map(str, layers_to_drop(SCALED.pattern, 56)))
    sizes = ["--hidden-size", "560", "--intermediate-size", "3136", "--drop-layers", drop]
    command = ["prune", str(tmp_path / "parent"), "--out", str(tmp_path / "out"), "--importance", str(tmp_path), *sizes]
    run = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.splitlines()[-1]) * 1024
    largest = SCALED.vocab_size * SCALED.hidden_size * 2
    assert weights > 500 * MIB and peak < 4 * largest + 60 * MIB < weights / 3
    with CheckpointReader(tmp_path / "out") as reader:
        nine = HybridConfig.preset("nano-9b-v2")
        assert (reader.config.pattern, reader.config.hidden_size, reader.config.intermediate_size) == (nine.pattern, 560, 3136)


def write_parent(directory):
    """A parent of zeros, written as it will be read: tensor by tensor."""
    from nanohybrid.model.declare import parameters

    with CheckpointWriter(directory, SCALED, torch.bfloat16, max_shard_bytes=200 * MIB) as writer:
        for name, declared in parameters(SCALED).items():
            writer.write(name, torch.zeros(declared.shape, dtype=torch.bfloat16))


def write_scores(directory):
    """Random scores of the parent's shape."""
    generator = torch.Generator().manual_seed(0)

    def draw(kind, *shape):
        return {i: torch.rand(*shape, generator=generator) for i, k in enumerate(SCALED.pattern) if k == kind}

    embedding = torch.rand(SCALED.hidden_size, generator=generator)
    mamba = draw("M", SCALED.mamba_num_heads, SCALED.mamba_head_dim)
    Importance(embedding, draw("-", SCALED.intermediate_size), mamba, draw("*", SCALED.num_attention_heads)).save(directory)
