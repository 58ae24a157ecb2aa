"""Byte-level BPE: the alphabet of the `tokenizers` library for raw bytes, and a tokenizer from its parts.

A vocabulary is stored as JSON, which has no bytes. So each byte value is written as one printable character:
printable Latin-1 characters stand for their own values, and the other 68 values use the code points from 256
on, in order.
"""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from nanohybrid.gguf.splitting import TEKKEN


def _alphabet() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(value) if value in printable else chr(next(spare)) for value in range(256)]


BYTE_TO_CHARACTER = _alphabet()
CHARACTER_TO_BYTE = {character: value for value, character in enumerate(BYTE_TO_CHARACTER)}

SPLIT_PATTERN = TEKKEN
"""The splitting rule of Nemotron's tokenizer."""


def to_characters(raw: bytes) -> str:
    """The bytes of a token in the byte alphabet."""
    return "".join(BYTE_TO_CHARACTER[value] for value in raw)


def to_bytes(token: str) -> bytes:
    """The raw bytes of a vocabulary entry.

    An entry outside the byte alphabet stands for its own text, as in the library.
    """
    if all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode()


def splitter(pattern: str = SPLIT_PATTERN) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that splits a text by `pattern` and writes the parts in the byte alphabet."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def assemble(
    special_tokens: Sequence[str],
    tokens: Iterable[str],
    merges: Iterable[tuple[str, str]],
    pattern: str = SPLIT_PATTERN,
) -> RawTokenizer:
    """A tokenizer whose ids are the special tokens, followed by `tokens`, both in the given order."""
    vocabulary = {token: number for number, token in enumerate([*special_tokens, *tokens])}
    # ignore_merges: a part that is a token becomes that token, even if the merges do not produce it.
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=True))
    raw.pre_tokenizer = splitter(pattern)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return raw
