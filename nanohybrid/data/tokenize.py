"""Documents to tokens and loss masks: BOS, the spans, EOS."""

from collections.abc import Iterable, Iterator
from itertools import islice

from nanohybrid.data.documents import Document
from nanohybrid.text import Tokenizer

DOCUMENTS_AT_ONCE = 4096


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[list[int], list[int]]]:
    """Each document as (tokens, loss mask), two lists of one length.

    Each span is encoded alone, so no token crosses the border between text with and without a loss. Special
    tokens in the text are encoded as plain characters. EOS has a loss, BOS has none.
    """
    stream = iter(documents)
    while several := list(islice(stream, DOCUMENTS_AT_ONCE)):
        ids = iter(
            tokenizer.encode_batch(
                [span.text for document in several for span in document.spans], parse_special=False
            )
        )
        for document in several:
            tokens, loss_mask = [tokenizer.bos_id], [0]
            for span in document.spans:
                part = next(ids)
                tokens += part
                loss_mask += [int(span.loss)] * len(part)
            yield [*tokens, tokenizer.eos_id], [*loss_mask, 1]
