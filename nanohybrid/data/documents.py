"""A document: pieces of text, each of which is either learned or only read.

The question of a task is read, its trace and answer are learned. That matters more than anything else for a small model: with a
loss on the questions, which no one can predict, the same model in the same time stayed at a quarter of the accuracy.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """A run of text; `loss` says whether its tokens are targets."""

    text: str
    loss: bool = True


class Document(NamedTuple):
    """Pieces that follow each other, and the name of the store that they are for."""

    store: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def plain(store: str, text: str) -> Document:
    """A document that is learned from its first token to its last."""
    return Document(store, (Piece(text),))


def sections(store: str, text: str, limit: int) -> Iterator[Document]:
    """A long text as documents of about `limit` characters, cut at empty lines where there are any, else at line ends."""
    part: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if part and (size + len(line) > 2 * limit or (size >= limit and not line.strip())):
            yield plain(store, "".join(part).strip("\n") + "\n")
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield plain(store, "".join(part).strip("\n") + "\n")


def up_to(documents: Iterable[Document], megabytes: float) -> Iterator[Document]:
    """The first documents, until they hold `megabytes` of characters."""
    left = megabytes * 1e6
    for document in documents:
        if left <= 0:
            return
        left -= len(document.text)
        yield document
