"""Tokenizers of several tests; each is built once."""

import pytest

from nanohybrid.text import Tokenizer, tekken, train_bpe

SAMPLE = """The quick brown fox counts 1, 2, 3 and 12 + 30 = 42.
def step(state, x):
    return state * 0.5 + x  # user: System, User, Assistant, think, no_think
Größe, naïve, 東京, مرحبا, 🙂🙂
"""


@pytest.fixture(scope="session")
def official() -> Tokenizer:
    """The 131,072 tokens of the released checkpoints."""
    pytest.importorskip(
        "mistral_common", reason="the file that tekken is rebuilt from comes with mistral-common"
    )
    return tekken()


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A BPE of 350 ids."""
    return train_bpe([SAMPLE] * 4, 350)
