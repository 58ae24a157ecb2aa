"""SmolLM2 from a Llama directory: transformers' logits and its most probable tokens."""

import pytest
import torch
from real_model import smollm2_directory

from nanohybrid.checkpoint import load
from nanohybrid.text import Tokenizer

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at 100 degrees Celsius at sea level. On a mountain the pressure is lower, so " * 12,
]


@pytest.fixture(scope="module")
def pair():
    transformers = pytest.importorskip("transformers")
    directory = smollm2_directory()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return directory, theirs, load(directory)


def test_plain_prompts_begin_as_in_transformers(pair):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(pair[0]), Tokenizer.from_directory(pair[0])
    for text in TEXTS:
        assert ours.encode(text, bos=ours.begins_with_bos) == theirs(text)["input_ids"]


@torch.no_grad()
def test_real_logits_equal_transformers(pair):
    directory, theirs, ours = pair
    tokenizer = Tokenizer.from_directory(directory)
    for text in TEXTS:
        tokens_BT = torch.tensor([tokenizer.encode(text)])
        got, want = ours(tokens_BT), theirs(tokens_BT, use_cache=False).logits
        assert (got - want).abs().max() / want.abs().max() < 1e-5
        assert torch.equal(got.argmax(-1), want.argmax(-1))
