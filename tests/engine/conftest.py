import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from nanohybrid.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """13 marks, the 256 bytes, and a few merged tokens that spell parts of the end mark and newlines with more."""
    marks = ["<unk>", "<s>", "</s>"] + [f"<SPECIAL_{i}>" for i in range(3, 13)]
    vocabulary = {mark: i for i, mark in enumerate(marks)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return Tokenizer(raw)
