"""Documents to tokens and loss flags: BOS, the pieces, EOS."""

from collections.abc import Iterable, Iterator
from itertools import islice

from nanohybrid.data.documents import Document
from nanohybrid.text import Tokenizer

DOCUMENTS_AT_ONCE = 4096


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[list[int], list[int]]]:
    """Each document as (tokens, loss).

    Pieces are encoded by themselves, so that no token spans the border between what is read and what is learned; special tokens in
    a text are plain characters. EOS is learned, BOS is not.
    """
    stream = iter(documents)
    while several := list(islice(stream, DOCUMENTS_AT_ONCE)):
        ids = iter(
            tokenizer.encode_batch(
                [piece.text for document in several for piece in document.pieces], parse_special=False
            )
        )
        for document in several:
            tokens, loss = [tokenizer.bos_id], [0]
            for piece in document.pieces:
                part = next(ids)
                tokens += part
                loss += [int(piece.loss)] * len(part)
            yield [*tokens, tokenizer.eos_id], [*loss, 1]
