"""A document: spans of text, each with or without a loss.

The question of a problem has no loss, its reasoning trace and answer have one. For a small model this matters
more than anything else: with a loss on the questions, which cannot be predicted, the same model reached a
quarter of the accuracy in the same time.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class TextSpan(NamedTuple):
    """A span of text; `loss` says whether its tokens are targets."""

    text: str
    loss: bool = True


class Document(NamedTuple):
    """Consecutive spans of text, and the name of the token store that they belong to."""

    store: str
    spans: tuple[TextSpan, ...]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(span.text for span in self.spans)


def plain(store: str, text: str) -> Document:
    """A document that has a loss on all of its tokens."""
    return Document(store, (TextSpan(text),))


def sections(store: str, text: str, limit: int) -> Iterator[Document]:
    """Split a long text into documents of about `limit` characters, at empty lines if possible, else at line
    ends."""
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
    """The first documents, until they have `megabytes` million characters or more."""
    left = megabytes * 1e6
    for document in documents:
        if left <= 0:
            return
        left -= len(document.text)
        yield document
