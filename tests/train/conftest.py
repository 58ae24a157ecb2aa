"""A tiny model, batches that depend on the step alone, and an output of `nanohybrid data`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.data import Batch, Mixture, Phase, TokenStore
from nanohybrid.data.corpus import write_mixture
from nanohybrid.text import train_bpe
from nanohybrid.train import LoopConfig, PrecisionConfig, PretrainRecipe

FIELDS: dict[str, Any] = {
    "pattern": "M*-M-",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "mamba_num_heads": 2,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 16,
    "initializer_range": 0.1,
}


@pytest.fixture
def config() -> HybridConfig:
    return HybridConfig(vocab_size=64, **FIELDS)


@pytest.fixture
def batches() -> Callable[[int], Batch]:
    """Sequences that count upwards from a random start: easy to learn, and new at every step."""

    def batch(step: int) -> Batch:
        starts = torch.randint(64, (4,), generator=torch.Generator().manual_seed(step)).tolist()
        counting = [
            [(start + i) % 64 for i in range(length)]
            for start, length in zip(starts, (17, 5, 30, 12), strict=True)
        ]
        return Batch.of((tokens, [1] * len(tokens)) for tokens in counting)

    return batch


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, a held-out one, and their tokenizer."""
    directory = tmp_path_factory.mktemp("data")
    lines = [f"line {number}: {number} + {number} = {2 * number}\n" for number in range(200)]
    tokenizer = train_bpe(lines, 300)
    tokenizer.save(directory)
    for name, part in (("sums", lines[:120]), ("more", lines[120:180]), ("validation-sums", lines[180:])):
        documents = [tokenizer.encode(line) for line in part]
        TokenStore.from_documents((ids, [1] * len(ids)) for ids in documents).write(
            directory / f"{name}.safetensors"
        )
    write_mixture(directory, Mixture.of([(1.0, {"sums": 1.0})]))
    return directory


@pytest.fixture
def recipe() -> PretrainRecipe:
    """Six steps in two phases."""
    return PretrainRecipe(
        model=FIELDS,
        steps=6,
        batch_tokens=128,
        sequence_length=32,
        phases=(Phase(0.5, {"sums": 1.0}), Phase(1.0, {"sums": 1.0, "more": 1.0})),
        precision=PrecisionConfig("bf16"),
        loop=LoopConfig(snapshot_steps=1, log_steps=1),
    )
