"""Tokenizers: text to ids and back, on top of the `tokenizers` library.

Two things differ from using the library directly. Special tokens (`<SPECIAL_11>` and the like) are parsed
only where the caller asks for it, so that a user cannot inject one. Decoding works on bytes, so that a stream
of tokens decodes to the same text as the whole list.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.files import atomic_write
from nanohybrid.gguf import is_gguf
from nanohybrid.text.bytelevel import to_bytes
from nanohybrid.text.settings import exists, read_settings, read_text

TOKENIZER_FILE = "tokenizer.json"
BOS, EOS, PAD = "<s>", "<SPECIAL_12>", "<unk>"
LARGEST_TOKENIZER = 256_000_000  # bytes of tokenizer.json
STOP_TOKENS = ("</s>", "<SPECIAL_11>", "<SPECIAL_12>")


class Tokenizer:
    """A byte-level BPE tokenizer with special tokens. Safe to share between threads."""

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool | None = None,
    ) -> None:
        raw.no_padding()
        raw.no_truncation()
        self._raw = raw
        added = raw.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        self._words = {number: token.content for number, token in added.items() if not token.special}
        self._ids = raw.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        stops = [self._ids[token] for token in STOP_TOKENS if token in self._ids]
        self.eos_id: int = self._first(EOS, [*eos_ids[:1], *stops])
        self.bos_id: int = self._first(BOS, [] if bos_id is None else [bos_id])
        self.pad_id: int = self._first(PAD, [] if pad_id is None else [pad_id])
        self.stop_ids = frozenset({*stops, *eos_ids})
        self.adds_bos: bool = self._library_adds_bos() if adds_bos is None else adds_bos
        """Whether the files say that other programs put BOS before a plain text."""
        self._beyond: dict[int, str] = {}

    def _library_adds_bos(self) -> bool:
        """Whether the post-processor of `tokenizer.json` puts BOS first."""
        return bool(self._raw.encode("", add_special_tokens=True).ids[:1] == [self.bos_id])

    @property
    def begins_with_bos(self) -> bool:
        """Whether a plain text begins with BOS for this model.

        Always with the vocabulary of Nemotron, whose documents begin with it in training. The files written
        here say otherwise to other programs (`add_bos_token` is false), because some of these put it before
        conversations too.
        """
        return self.adds_bos or (EOS in self._ids and self.bos_id in self._special)

    def _first(self, token: str, otherwise: Sequence[int]) -> int:
        return self._ids.get(token, otherwise[0] if otherwise else 0)

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises CheckpointError where it cannot be read."""
        return cls(_read(Path(path)))

    @classmethod
    def from_directory(cls, directory: Path | str, vocab_size: int | None = None) -> "Tokenizer":
        """Read the tokenizer of a checkpoint.

        vocab_size: of the model; None reads it from config.json. Raises CheckpointError where the tokenizer
        cannot be read or has more ids than the model. Added tokens whose ids the model does not have, as
        after `add_special_tokens` without a resize, are the exception: `encode` refuses a text with one.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        config, generation = (
            read_settings(directory / name) for name in ("config.json", "generation_config.json")
        )
        both = {**config, **{key: value for key, value in generation.items() if value is not None}}
        said = read_settings(directory / "tokenizer_config.json").get("add_bos_token")
        tokenizer = cls(
            _read(path),
            eos_ids=_ids(both.get("eos_token_id")),
            bos_id=_id(both, "bos_token_id"),
            pad_id=_id(both, "pad_token_id"),
            adds_bos=said if isinstance(said, bool) else None,
        )
        limit = vocab_size if vocab_size is not None else _id(config, "vocab_size")
        if limit is not None and not tokenizer.limit(limit):
            raise CheckpointError(
                f"{path}: has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary ends at "
                f"{limit - 1}; "
                "use the tokenizer.json of the model"
            )
        return tokenizer

    def limit(self, vocab_size: int) -> bool:
        """Restrict the vocabulary to the ids that a model has. Returns whether no more than added tokens are
        left out; otherwise nothing changes.
        """
        if self.vocab_size <= vocab_size:
            return True
        added = self._raw.get_added_tokens_decoder()
        beyond = {number: token for token, number in self._ids.items() if number >= vocab_size}
        if set(beyond) - set(added):
            return False
        self._beyond, self.vocab_size = beyond, vocab_size
        self._special = {number: name for number, name in self._special.items() if number < vocab_size}
        self._words = {number: name for number, name in self._words.items() if number < vocab_size}
        self._ids = {token: number for token, number in self._ids.items() if number < vocab_size}
        return True

    def save(self, directory: Path | str) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that transformers needs into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / TOKENIZER_FILE, self._raw.to_str(pretty=False))
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        settings: dict[str, Any] = {
            name: self._special[number] for name, number in names.items() if number in self._special
        }
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
        }
        atomic_write(directory / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")

    # Encoding

    def encode(self, text: str, bos: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of `text`.

        parse_special   True: a special token's name in the text becomes its id. False: it is encoded as plain
                        characters.
        bos             True: the BOS token comes first.
        Raises InputError for a text with half a surrogate pair, which UTF-8 cannot encode, and for a token
        that the model does not have.
        """
        raw = self._raw if parse_special else self._plain
        ids: list[int] = raw.encode(_whole(text), add_special_tokens=False).ids
        self._check_beyond(ids)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, parse_special: bool = True
    ) -> list[list[int]]:
        """`encode` of each text, in parallel on all cores."""
        raw = self._raw if parse_special else self._plain
        start = [self.bos_id] if bos else []
        found = raw.encode_batch_fast([_whole(text) for text in texts], add_special_tokens=False)
        for one in found if self._beyond else ():
            self._check_beyond(one.ids)
        return [start + one.ids for one in found]

    def _check_beyond(self, ids: Sequence[int]) -> None:
        """Raise InputError for a token that the tokenizer has and the model does not."""
        wrong = next((number for number in ids if number in self._beyond), None) if self._beyond else None
        if wrong is not None:
            raise InputError(
                f"the text has {self._beyond[wrong]}, the token {wrong}, but the model's vocabulary ends at "
                f"{self.vocab_size - 1}"
            )

    @cached_property
    def _plain(self) -> RawTokenizer:
        # A copy, because changing a setting for one call would affect other threads.
        plain = RawTokenizer.from_str(self._raw.to_str())
        plain.encode_special_tokens = True
        return plain

    # Decoding

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary add nothing."""
        return b"".join(self.token_bytes(number, skip_special_tokens) for number in ids).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, number: int, skip_special_tokens: bool = True) -> bytes:
        """The raw bytes of one token.

        For a special token: none, or its name with `skip_special_tokens=False`.
        """
        if not skip_special_tokens and number in self._special:
            return self._special[number].encode()
        return self._bytes[number] if 0 <= number < len(self._bytes) else b""

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, number in self._ids.items():
            if number in self._words:
                table[number] = token.encode()
            elif number not in self._special:
                table[number] = to_bytes(token)
        return table

    # Special tokens

    @property
    def special_tokens(self) -> dict[int, str]:
        """Names of the special tokens by id."""
        return self._special

    @cached_property
    def special_token_pattern(self) -> re.Pattern[str]:
        """Matches any special token's name in a text, the longest first.

        Without special tokens it matches nothing.
        """
        names = sorted(self._special.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, or None."""
        return self._ids.get(token)


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has half a surrogate pair at character {error.start}, which UTF-8 cannot encode; "
            "remove it"
        ) from None
    return text


def _read(path: Path) -> RawTokenizer:
    if not exists(path):
        if is_gguf(path.parent):
            raise CheckpointError(f"{path.parent}: has no tokenizer, so it cannot read text")
        raise CheckpointError(
            f"{path}: no such file; `nanohybrid tokenizer tekken --out {path.parent}` writes that of Nemotron"
        )
    source = read_text(path, LARGEST_TOKENIZER)
    try:
        json.loads(source)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({_line(error)}); is it truncated?") from None
    try:
        raw = RawTokenizer.from_str(source)
    except Exception as error:  # noqa: BLE001  the library raises bare Exception
        raise CheckpointError(
            f"{path}: is not a tokenizer of the `tokenizers` library ({_line(error)})"
        ) from None
    if '"ByteLevel"' not in json.dumps(json.loads(source).get("decoder")):
        raise CheckpointError(
            f"{path}: is not a byte-level BPE tokenizer, as those of Nemotron and Qwen are; others are not "
            "supported"
        )
    return raw


def _ids(value: Any) -> list[int]:
    """The valid ids of a setting, which is one id or a list; some files have -1 for no id."""
    each = value if isinstance(value, list) else [value]
    return [one for one in each if type(one) is int and 0 <= one < 2**31]


def _id(settings: dict[str, Any], name: str) -> int | None:
    return next(iter(_ids(settings.get(name))), None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
