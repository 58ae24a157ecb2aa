"""A small byte-level BPE of one's own, with the special tokens and the splitting rule of the large one.

Ids: 0..12 the special tokens, 13..268 the bytes in their order, then the merges in the order in which they were learned. So a model
trained on it speaks the same chat format as a released checkpoint, and 269 is the smallest vocabulary.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, trainers

from nanohybrid.errors import InputError
from nanohybrid.text.bytelevel import BYTE_TO_CHARACTER, assemble, splitter
from nanohybrid.text.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", *(f"<SPECIAL_{number}>" for number in range(3, 13)))
SMALLEST = len(SPECIAL_TOKENS) + 256


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from `texts` until `vocab_size` ids are there, or no pair of tokens comes twice (then it is smaller)."""
    if vocab_size < SMALLEST:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small; the special tokens and the bytes alone are {SMALLEST}"
        )
    learner = RawTokenizer(models.BPE())
    learner.pre_tokenizer = splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=BYTE_TO_CHARACTER,
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(iter(texts), trainer)
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    learned = [left + right for left, right in merges]
    return Tokenizer(assemble(SPECIAL_TOKENS, [*BYTE_TO_CHARACTER, *dict.fromkeys(learned)], merges))
