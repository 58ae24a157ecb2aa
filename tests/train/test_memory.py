"""The predicted memory of a training step, against what autograd saves and the peak of a process."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

import nanohybrid
from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.training import TrainingMemory
from nanohybrid.model import HybridLM
from nanohybrid.train.checkpointing import checkpointed
from nanohybrid.train.precision import autocast

STEP = """
import json, random, resource, sys
import torch
import nanohybrid
from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch
from nanohybrid.model import HybridLM
from nanohybrid.train.checkpointing import checkpointed
from nanohybrid.train.next_token import next_token_loss
from nanohybrid.train.optimizer import OptimizerConfig, adamw, clip_grad_norm
from nanohybrid.train.precision import autocast

tokens, mode, every, fields = json.loads(sys.argv[1])
torch.set_num_threads(1)
model = HybridLM(nanohybrid.preset("mini").replace(**fields), seed=0)
optimizer, rng = adamw(model, OptimizerConfig()), random.Random(0)
for _ in range(2):
    lengths = [128] * (tokens // 128)
    batch = Batch.of([([rng.randrange(512) for _ in range(n)], [1] * n) for n in lengths])
    optimizer.zero_grad(set_to_none=True)
    with autocast(mode, torch.device("cpu")), checkpointed(model.backbone.layers, every):
        total, count = next_token_loss(model, batch)
        (total / count).backward()
    clip_grad_norm(model, 1.0)
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def saved_by_autograd(config: HybridConfig, mode: str, every: int, lengths: list[int]) -> int:
    """Bytes of the storages that a forward pass saves for the backward pass, without parameters."""
    model, rng = HybridLM(config, seed=0), random.Random(0)
    batch = Batch.of([([rng.randrange(config.vocab_size) for _ in range(n)], [1] * n) for n in lengths])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(mode, torch.device("cpu")), checkpointed(model.backbone.layers, every):
        hidden = model.hidden(batch.tokens_T, batch.layout)
    assert hidden.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-dense", "mini"])
def test_training_memory_predicts_the_activations_saved_by_autograd(preset, mode):
    lengths = [100, 120, 80, 100]
    config = nanohybrid.preset(preset)
    memory = TrainingMemory.of(config, sum(lengths), mode)
    found = saved_by_autograd(config, mode, 0, lengths)
    assert found == pytest.approx(memory.kept_bytes + memory.cast_bytes, rel=0.05)


def test_training_memory_of_checkpointed_layers_is_the_residual_stream():
    config = nanohybrid.preset("tiny")
    found = saved_by_autograd(config, "fp32", 1, [200, 200])
    assert found == pytest.approx(TrainingMemory.of(config, 400, "fp32", 1).kept_bytes, rel=0.15)
    assert found < 0.2 * TrainingMemory.of(config, 400, "fp32").kept_bytes


def test_training_memory_of_activations_grows_with_tokens_and_of_the_loss_does_not():
    config = nanohybrid.preset("nano-291m")
    one, two = (TrainingMemory.of(config, tokens) for tokens in (4096, 8192))
    assert two.kept_bytes == 2 * one.kept_bytes
    assert two.loss_bytes == one.loss_bytes


def test_training_memory_of_a_chunk_of_logits_is_bounded():
    small, large = (nanohybrid.preset("nano-291m").replace(vocab_size=size) for size in (65_536, 131_072))
    logits = [
        TrainingMemory.of(one, 4096).loss_bytes - 8 * one.vocab_size * one.hidden_size
        for one in (small, large)
    ]
    assert logits[0] == logits[1] == 2 * 2**25


CASES = [
    (16_384, "bf16", 0, {}),
    (16_384, "bf16", 1, {}),
    (8192, "fp32", 0, {}),
    (2048, "bf16", 0, {"vocab_size": 65_536}),
]


@pytest.mark.parametrize(
    "tokens, mode, every, fields",
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_training_memory_predicts_the_peak_of_a_process(tokens, mode, every, fields):
    """Within a tenth of the peak, of which about 0.4 GiB are torch and numba themselves.

    Blocks of 1 to 32 MiB otherwise come from glibc's heap, whose holes are another matter (docs/log.md).
    """
    command = [sys.executable, "-c", STEP, json.dumps([tokens, mode, every, fields])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    said = TrainingMemory.of(nanohybrid.preset("mini").replace(**fields), tokens, mode, every).peak_bytes
    assert int(done.stdout) == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("tokens, mode, every", [(0, "bf16", 0), (8, "fp8", 0), (8, "bf16", -1)])
def test_training_memory_refuses_bad_sizes_and_modes(tokens, mode, every):
    with pytest.raises(ConfigError, match="modes are fp32 and bf16, sizes positive"):
        TrainingMemory.of(nanohybrid.preset("tiny"), tokens, mode, every)
