"""Byte-level BPE: the alphabet in which `tokenizers` writes raw bytes, and a tokenizer put together from its parts.

A vocabulary is JSON, and JSON has no bytes: each of the 256 byte values is written as one printable character. Values that are
printable Latin-1 stand for themselves; the other 68 take the code points from 256 on, in order.
"""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer


def _alphabet() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(value) if value in printable else chr(next(spare)) for value in range(256)]


BYTE_TO_CHARACTER = _alphabet()
CHARACTER_TO_BYTE = {character: value for value, character in enumerate(BYTE_TO_CHARACTER)}

# Tekken's splitting rule: words that begin upper case or end lower case (with the one
# punctuation mark or space before them), single digits, runs of punctuation with the line ends after them, and white space.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BEFORE_A_WORD = r"[^\r\n\p{L}\p{N}]?"
SPLIT_PATTERN = "|".join(
    (
        rf"{_BEFORE_A_WORD}[{_UPPER}]*[{_LOWER}]+",
        rf"{_BEFORE_A_WORD}[{_UPPER}]+[{_LOWER}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def to_characters(raw: bytes) -> str:
    """The bytes of a token as a vocabulary writes them."""
    return "".join(BYTE_TO_CHARACTER[value] for value in raw)


def to_bytes(token: str) -> bytes:
    """The raw bytes of a vocabulary entry; one that is not in the byte alphabet is its own text, as the library has it."""
    if all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode()


def splitter(pattern: str = SPLIT_PATTERN) -> pre_tokenizers.PreTokenizer:
    """Cut a text by `pattern`, then write each piece's bytes in the byte alphabet."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def assemble(
    special_tokens: Sequence[str],
    tokens: Iterable[str],
    merges: Iterable[tuple[str, str]],
    pattern: str = SPLIT_PATTERN,
) -> RawTokenizer:
    """A tokenizer whose ids are the special tokens, then `tokens`, both in their order."""
    vocabulary = {token: number for number, token in enumerate([*special_tokens, *tokens])}
    # ignore_merges: a piece that is a token is that token, even where the merges would not lead there.
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=True))
    raw.pre_tokenizer = splitter(pattern)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return raw
