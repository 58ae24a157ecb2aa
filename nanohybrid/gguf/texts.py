"""The text files of a checkpoint, from a directory or from the metadata of a GGUF file.

config.json             sizes of the model
tokenizer.json          tokens, merges, splitting rule
tokenizer_config.json   BOS, EOS and PAD; several chat templates by name
generation_config.json  the ids that end an answer
chat_template.jinja     the chat template
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from nanohybrid.files import read_regular
from nanohybrid.gguf.configuration import config_object, token_id
from nanohybrid.gguf.header import GgufFile, is_gguf, open_gguf
from nanohybrid.gguf.vocabulary import (
    chat_template,
    has_tokenizer,
    stop_ids,
    tokenizer_config,
    tokenizer_json,
)

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NAMES = (CONFIG, GENERATION, TOKENIZER, SETTINGS, TEMPLATE)


def has_text(path: Path) -> bool:
    """Whether there is the text file CHECKPOINT/NAME, where CHECKPOINT is a directory or a GGUF file."""
    if not is_gguf(path.parent):
        return path.exists()
    file = open_gguf(path.parent)
    if path.name in (TOKENIZER, SETTINGS):
        return has_tokenizer(file)
    return path.name in NAMES and (path.name != TEMPLATE or chat_template(file) is not None)


def read_text(path: Path, most: int) -> bytes:
    """The text file CHECKPOINT/NAME, where CHECKPOINT is a directory or a GGUF file.

    most: bytes of a file at most; what is made from metadata has the limits of the header. Raises OSError as
    files.read_regular does, and CheckpointError where a GGUF file is damaged or has what is not supported.
    """
    if not is_gguf(path.parent):
        return read_regular(path, most)
    if not has_text(path):
        raise FileNotFoundError(2, "the metadata has none", str(path))
    return _made(open_gguf(path.parent), path.name)


def copy_texts(source: Path, names: Sequence[str], directory: Path) -> None:
    """Write those of the text files `names` that a checkpoint has into a directory.

    Raises OSError, and CheckpointError as `read_text`.
    """
    for name in names:
        if is_gguf(source):
            if has_text(source / name):
                (directory / name).write_bytes(_made(open_gguf(source), name))
        elif (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _made(file: GgufFile, name: str) -> bytes:
    """The text that stands in the metadata of a file."""
    if name == TEMPLATE:
        return (chat_template(file) or "").encode()
    if name == CONFIG:
        return _json(config_object(file))
    if name == GENERATION:
        return _json({"bos_token_id": token_id(file, "bos_token_id"), "eos_token_id": stop_ids(file)})
    return _json(tokenizer_json(file) if name == TOKENIZER else tokenizer_config(file))


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
