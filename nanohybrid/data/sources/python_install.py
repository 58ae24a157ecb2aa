"""Code and prose of the Python installation: the standard library's sources, its docstrings, and pydoc's
topics.

Another minor version of Python gives a slightly different corpus.
"""

import ast
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nanohybrid.data.documents import Document, sections

# Tests, generated tables and installed packages are not representative code.
SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "ensurepip",
        "pydoc_data",
        "__pycache__",
    }
)


def code(seed: int, section_characters: int) -> Iterator[Document]:
    """Sections of the standard library's sources, the files in a random order."""
    for path in _files(seed):
        yield from sections("code", path.read_text(encoding="utf-8", errors="replace"), section_characters)


def prose(seed: int, section_characters: int) -> Iterator[Document]:
    """The language reference of pydoc, then docstrings.

    Short docstrings of one file are joined to one document.
    """
    for text in _topics():
        yield from sections("prose", text, section_characters)
    for path in _files(seed):
        yield from _docstrings(path, section_characters)


def _topics() -> list[str]:
    from pydoc_data.topics import topics  # half a megabyte, imported only here

    return [topics[name] for name in sorted(topics)]


def _docstrings(path: Path, section_characters: int) -> Iterator[Document]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:  # Debian's Python ships a few templates among the sources
        return
    short: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node) or ""
        if len(text) >= section_characters // 4:
            yield from sections("prose", text, section_characters)
        elif text:
            name = "" if isinstance(node, ast.Module) else f"{node.name}: "
            short.append(name + text)
    if short:
        yield from sections("prose", "\n\n".join(short), section_characters)


def _files(seed: int) -> list[Path]:
    found: list[Path] = []
    for directory, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(folder for folder in folders if folder not in SKIPPED)
        found += [Path(directory) / name for name in sorted(names) if name.endswith(".py")]
    random.Random(seed).shuffle(found)
    return found
