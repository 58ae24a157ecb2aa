"""A CUDA device (a mock in the default suite, a real GPU with `-m gpu`) and tiny models for it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mock_cuda import mock_cuda_device

from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.data import Mixture, TokenStore
from nanohybrid.data.corpus import write_mixture
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, Tokenizer, train_bpe

TEXT = ["run 1+2*3\n1+2=3\n3*3=9\n</think>\n\nSystem User Assistant <think>\n"] * 4
SMALL: dict[str, Any] = dict(
    pattern="M-M*-", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=8, initializer_range=0.2,
)  # fmt: skip
DENSE: dict[str, Any] = dict(
    pattern="*-*-", rope_theta=10_000.0, qk_norm=True, mlp_activation="swiglu", tie_word_embeddings=True
)


@pytest.fixture(params=["mock", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device for a stage. The torch forms of the ops run on the mock; a real GPU runs its own kernels."""
    if request.param == "real":
        yield "cuda"
        return
    monkeypatch.setenv("NANOHYBRID_KERNELS", "torch")
    with mock_cuda_device():
        yield "cuda"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `nanohybrid data`: a store, a held-out store, the tokenizer and the mixture."""
    directory = tmp_path_factory.mktemp("data")
    tokenizer = train_bpe(TEXT, 290)
    tokenizer.save(directory)
    ChatTemplate.default().save(directory)
    rng = np.random.default_rng(0)
    for name, count in (("text", 40), ("validation-text", 4)):
        lengths = rng.integers(5, 40, count)
        TokenStore.from_documents(
            (rng.integers(13, 280, n), np.r_[np.zeros(2), np.ones(n - 2)]) for n in lengths
        ).write(directory / f"{name}.safetensors")
    write_mixture(directory, Mixture.of([(1.0, {"text": 1.0})]))
    return directory


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A checkpoint of random weights."""
    return written(tmp_path_factory.mktemp("models") / "parent", data, SMALL)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A Transformer checkpoint of random weights."""
    return written(tmp_path_factory.mktemp("models") / "dense", data, SMALL | DENSE)


def written(directory: Path, data: Path, shape: dict[str, Any]) -> Path:
    config = HybridConfig(vocab_size=Tokenizer.from_directory(data).vocab_size, **shape)
    save(HybridLM(config, seed=0), directory, assets=data)
    return directory
