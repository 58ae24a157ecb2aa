"""Tokenized documents in one file, `NAME.safetensors`, which is memory-mapped and not loaded.

tokens   int32 [n]
loss     uint8 [n]               the loss mask: 1 where a token is a target
offsets  int64 [documents + 1]   document i is tokens[offsets[i] : offsets[i + 1]]
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nanohybrid.errors import InputError

STORES = "stores"  # subdirectory of a stage's output with the documents that it made, for later stages

TYPES = {"tokens": ("I32", np.int32), "loss": ("U8", np.uint8), "offsets": ("I64", np.int64)}
TokensAndLossMask = tuple[
    Sequence[int] | NDArray[np.int32], Sequence[int] | Sequence[bool] | NDArray[np.uint8]
]


class TokenStore:
    """Documents as arrays, in memory or mapped from a file; `len()` is the number of documents.

    Raises InputError where the offsets do not fit the arrays.
    """

    def __init__(
        self, tokens: NDArray[np.int32], loss_mask: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> None:
        ends_meet = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(tokens) == len(loss_mask)
        if not ends_meet or bool((np.diff(offsets) < 0).any()):
            raise InputError(
                f"offsets do not split {len(tokens):,} tokens and {len(loss_mask):,} loss mask values into "
                "documents; "
                "build the store again"
            )
        self.tokens = tokens
        self.loss_mask = loss_mask
        self.offsets = offsets

    @classmethod
    def from_documents(cls, documents: Iterable[TokensAndLossMask]) -> "TokenStore":
        """A store in memory, from (tokens, loss mask) of each document."""
        tokens, loss_masks, lengths = [], [], [0]
        for document_tokens, document_loss_mask in documents:
            tokens.append(np.asarray(document_tokens, dtype=np.int32))
            loss_masks.append(np.asarray(document_loss_mask, dtype=np.uint8))
            lengths.append(len(tokens[-1]))
        if not tokens:
            return cls(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(1, np.int64))
        return cls(np.concatenate(tokens), np.concatenate(loss_masks), np.cumsum(lengths, dtype=np.int64))

    @classmethod
    def read(cls, path: Path | str) -> "TokenStore":
        """Map a store from its file. Raises InputError, naming the file, where it is missing or damaged."""
        try:
            return cls(*_map(Path(path)))
        except FileNotFoundError:
            raise InputError(f"{path}: no such token store; `nanohybrid data --out DIR` builds one") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, InputError) as error:
            raise InputError(f"{path}: damaged token store ({error}); build it again") from None

    def write(self, path: Path | str) -> Path:
        """Write the store to `path`, which is returned; missing parent directories are made."""
        arrays = {"tokens": self.tokens, "loss": self.loss_mask, "offsets": self.offsets}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(path))
        return Path(path)

    def check_ids(self, vocab_size: int, where: Path | str) -> None:
        """Raise InputError, naming `where`, if some ids are outside a vocabulary of `vocab_size`."""
        smallest, largest = int(self.tokens.min(initial=0)), int(self.tokens.max(initial=0))
        if smallest < 0 or largest >= vocab_size:
            found = f"{smallest} to {largest}" if smallest < 0 else f"up to {largest}"
            raise InputError(
                f"{where}: has ids {found}, but the model's vocabulary ends at {vocab_size - 1}: was it made "
                "with another tokenizer?"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> int:
        """Number of tokens of all documents."""
        return len(self.tokens)

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Tokens and loss mask of one document."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.loss_mask[span]


def _map(path: Path) -> list[np.ndarray]:
    """The three arrays of a safetensors file, mapped.

    The numpy reader of the safetensors library would copy them.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) if size < 1 << 20 else {}
    arrays = []
    for name, (code, dtype) in TYPES.items():
        entry = header[name]
        if entry["dtype"] != code:
            raise ValueError(f"{name} is {entry['dtype']}, not {code}")
        (count,), (begin, _) = entry["shape"], entry["data_offsets"]
        empty = np.zeros(0, dtype=dtype)
        arrays.append(
            np.memmap(path, dtype=dtype, mode="r", offset=8 + size + begin, shape=(count,))
            if count
            else empty
        )
    return arrays
