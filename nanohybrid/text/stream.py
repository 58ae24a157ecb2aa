"""Incremental decoding.

A character whose UTF-8 bytes are spread over several tokens is returned once it is complete.
"""

import codecs

from nanohybrid.text.tokenizer import Tokenizer


class TextStream:
    """Decodes ids one by one.

    The results of `push` and `flush`, joined, equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        """The characters that this token completes, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(number, self._skip_special_tokens))

    def flush(self) -> str:
        """End of the text: U+FFFD for an incomplete character. The stream can be used again."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail
