"""Text and JSON files beside the weights, or in the metadata of a GGUF file, read as untrusted input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanohybrid.errors import CheckpointError
from nanohybrid.gguf import texts

LARGEST_SETTINGS = 64_000_000
"""Bytes of a file of settings at most."""


def exists(path: Path) -> bool:
    """Whether a checkpoint has the file CHECKPOINT/NAME."""
    return texts.has_text(path)


def read_text(path: Path, most: int) -> str:
    """The text of a file of at most `most` bytes, without a byte order mark.

    Raises CheckpointError where it cannot be read, is no regular file or no UTF-8.
    """
    try:
        return texts.read_text(path, most).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read as text ({reason})") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises CheckpointError for a damaged one.
    """
    if not exists(path):
        return {}
    try:
        value = json.loads(read_text(path, LARGEST_SETTINGS))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path}: is not JSON ({reason}); is it truncated?") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is a JSON {type(value).__name__}, not an object")
    return value
