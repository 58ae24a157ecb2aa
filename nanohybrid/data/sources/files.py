"""The user's files: .txt, .md and .py files, and .jsonl files with one document's "text" on each line."""

import json
from collections.abc import Iterator
from pathlib import Path

from nanohybrid.data.documents import Document, sections
from nanohybrid.errors import InputError

PLAIN = (".txt", ".md", ".py")
LINES = ".jsonl"


def texts(path: Path) -> Iterator[str]:
    """The text of every document under `path`, a directory or a file, sorted by file name.

    Raises InputError where there is no such path, no file of a known type, or a bad line.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.suffix in (*PLAIN, LINES) and file.is_file())
    )
    if not files:
        raise InputError(f"{path}: has no {', '.join(PLAIN)} or {LINES} files")
    for file in files:
        if file.suffix == LINES:
            yield from _lines(file)
        else:
            # Bytes that are not UTF-8 become U+FFFD, and the quality filter drops and counts such documents.
            yield file.read_text(encoding="utf-8", errors="replace")


def files(path: Path, section_characters: int) -> Iterator[Document]:
    """The documents under `path`; long texts are split into sections."""
    for text in texts(path):
        yield from sections("files", text, section_characters)


def _lines(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise InputError(f'{file}:{number}: not a JSON object with a "text"; every line must be one')
            yield text
