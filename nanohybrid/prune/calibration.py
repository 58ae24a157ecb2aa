"""Calibration: a small set of documents on which importance is measured and candidates are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanohybrid.data import Batch, TokenStore
from nanohybrid.data.store import STORES
from nanohybrid.errors import InputError
from nanohybrid.text import Tokenizer

VALIDATION = "validation"
WEIGHTS = "model"
"""How a file of weights begins: a checkpoint is no directory of token stores."""

Sample = tuple[NDArray[np.int32], NDArray[np.uint8]]


@dataclass(frozen=True)
class Calibration:
    """Samples as (tokens, loss mask). The mask says which tokens a loss counts; activations are measured on
    all tokens."""

    samples: tuple[Sample, ...]

    @classmethod
    def read(cls, path: Path, tokenizer: Path, num_samples: int = 256, max_length: int = 512) -> Calibration:
        """At most `num_samples` documents, evenly spaced over those that `path` holds, each cut to
        `max_length` tokens.

        path: a directory of token stores (its subdirectory `stores` where it has one), one store, or JSON
        lines with `text`, which the tokenizer of the directory `tokenizer` encodes. Raises InputError where
        there is nothing to read.
        """
        if path.suffix in (".jsonl", ".json", ".txt"):
            documents = list(_texts(path, tokenizer))
        else:
            documents = [store.document(index) for store in _stores(path) for index in range(len(store))]
        documents = [document for document in documents if len(document[0]) > 1]
        if not documents or num_samples < 1 or max_length < 2:
            raise InputError(
                f"{path}: no documents of two tokens or more to calibrate with "
                f"({num_samples} samples, at most {max_length} tokens of each)"
            )
        count = min(num_samples, len(documents))
        chosen = np.unique(np.linspace(0, len(documents) - 1, count).round().astype(int))
        cut = (
            (np.array(t[:max_length]), np.array(m[:max_length])) for t, m in (documents[i] for i in chosen)
        )
        return cls(tuple(cut))

    @property
    def tokens(self) -> int:
        """Tokens of all samples together."""
        return sum(len(tokens) for tokens, _ in self.samples)

    @property
    def hash(self) -> str:
        """A name for exactly these samples: 16 hex digits of a SHA-256."""
        digest = hashlib.sha256()
        for tokens, mask in self.samples:
            digest.update(
                len(tokens).to_bytes(8, "little")
                + tokens.astype("<i4").tobytes()
                + mask.astype("u1").tobytes()
            )
        return digest.hexdigest()[:16]

    def batches(self, batch_tokens: int = 4096) -> Iterator[Batch]:
        """The samples in order, whole, in batches of about `batch_tokens` tokens."""
        part: list[Sample] = []
        for sample in self.samples:
            if part and sum(len(tokens) for tokens, _ in part) + len(sample[0]) > batch_tokens:
                yield Batch.of(part)
                part = []
            part.append(sample)
        yield Batch.of(part)

    def spread(self, tokens: int) -> Calibration:
        """About `tokens` tokens of samples, evenly spaced over all; all where they have no more."""
        if self.tokens <= tokens:
            return self
        count = max(1, tokens * len(self.samples) // self.tokens)
        chosen = np.unique(np.linspace(0, len(self.samples) - 1, count).round().astype(int))
        return Calibration(tuple(self.samples[i] for i in chosen))

    def first(self, tokens: int) -> Calibration:
        """The first samples, up to about `tokens` tokens and at least one."""
        total, count = 0, 0
        for sample in self.samples:
            if count and total + len(sample[0]) > tokens:
                break
            total, count = total + len(sample[0]), count + 1
        return Calibration(self.samples[:count])


def store_paths(path: Path) -> list[Path]:
    """The token stores under `path`: itself, or those of the directory or of its `stores`; held-out ones are
    left out.

    Raises InputError where there are none.
    """
    if path.is_file():
        return [path]
    folder = path / STORES if (path / STORES).is_dir() else path
    found = [
        file
        for file in sorted(folder.glob("*.safetensors"))
        if not file.stem.startswith((VALIDATION, WEIGHTS))
    ]
    if not found:
        raise InputError(
            f"{path}: holds no token stores (*.safetensors); give a directory that `nanohybrid data` "
            "or `align` wrote"
        )
    return found


def _stores(path: Path) -> list[TokenStore]:
    return [TokenStore.read(file) for file in store_paths(path)]


def _texts(path: Path, tokenizer: Path) -> Iterator[Sample]:
    encoder = Tokenizer.from_directory(tokenizer)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    for number, line in enumerate(lines, 1):
        text = line if path.suffix == ".txt" else _text_of(line, path, number)
        ids = encoder.encode(text, parse_special=False) if text.strip() else []
        yield np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.uint8)


def _text_of(line: str, path: Path, number: int) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(
            f'{path}:{number}: not a JSON object with a "text"; give one such object on each line'
        )
    return row["text"]
