"""Training of a small byte-level BPE with the special tokens and the splitting rule of tekken.

Ids: 0 to 12 are the special tokens, 13 to 268 the bytes in order, then the merges in the order of training.
So a model trained with it uses the chat format of the released checkpoints, and the smallest vocabulary has
269 ids.
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
    """Train a tokenizer of `vocab_size` ids, or fewer if no pair of tokens occurs twice.

    Raises InputError for a vocabulary below 269 ids.
    """
    if vocab_size < SMALLEST:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small; special tokens and bytes need {SMALLEST}"
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
