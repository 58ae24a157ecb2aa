"""An untrained base model with the tokenizer of the tasks, and a data directory of text."""

from pathlib import Path

import pytest

from nanohybrid.align.chats import ChatMaker
from nanohybrid.checkpoint import save
from nanohybrid.config import HybridConfig
from nanohybrid.data import Mixture, TokenStore
from nanohybrid.data.corpus import write_mixture
from nanohybrid.model import HybridLM
from nanohybrid.text import ChatTemplate, Tokenizer, train_bpe

TEXT = ["run 1+2*3\n1+2=3\n3*3=9\n</think>\n\nSystem User Assistant <think>\n"] * 4


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    tokenizer = train_bpe(TEXT, 290)
    tokenizer.save(directory)
    TokenStore.from_documents((ids, [1] * len(ids)) for ids in map(tokenizer.encode, TEXT)).write(
        directory / "text.safetensors"
    )
    write_mixture(directory, Mixture.of([(1.0, {"text": 1.0})]))
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    config = HybridConfig(
        pattern="M*-",
        vocab_size=Tokenizer.from_directory(data).vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mamba_num_heads=2,
        mamba_head_dim=32,
        n_groups=1,
        ssm_state_size=16,
        initializer_range=0.1,
    )
    save(HybridLM(config, seed=0), directory, assets=data)
    return directory


@pytest.fixture
def maker(data: Path) -> ChatMaker:
    return ChatMaker(Tokenizer.from_directory(data), ChatTemplate.default())
