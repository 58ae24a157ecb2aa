"""Text out of tokens as they come: a character whose UTF-8 is spread over several tokens appears once, whole."""

import codecs

from nanohybrid.text.tokenizer import Tokenizer


class TextStream:
    """Feed ids one by one; what `push` and `flush` return, joined, is `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        """The characters that this token completes; often none, in a text of other scripts."""
        return self._decoder.decode(self._tokenizer.token_bytes(number, self._skip_special_tokens))

    def flush(self) -> str:
        """The end: U+FFFD where a character was begun and never completed. The stream can be used anew."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail
