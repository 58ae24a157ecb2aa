"""The chat templates of a checkpoint directory, in all places where Hugging Face puts them.

A GGUF file has the first two in its metadata.

chat_template.jinja                    the default
tokenizer_config.json, chat_template   the default where that file is missing, or a list of all
additional_chat_templates/NAME.jinja   the others, by name
"""

from pathlib import Path
from typing import Any

from nanohybrid.errors import CheckpointError
from nanohybrid.text.settings import exists, read_settings, read_text

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
ADDITIONAL = "additional_chat_templates"
LARGEST_TEMPLATE = 1_000_000  # bytes
DEFAULT, TOOL_USE = "default", "tool_use"


def read_templates(directory: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """(name -> (file, source), values of bos_token and eos_token). Raises CheckpointError for a damaged file.

    The default is named "default"; a directory without one has no entry of that name.
    """
    settings_file, file = directory / SETTINGS_FILE, directory / TEMPLATE_FILE
    settings = read_settings(settings_file)
    specials = {name: _content(settings[name]) for name in ("bos_token", "eos_token") if settings.get(name)}
    found = {path.stem: (str(path), _read(path)) for path in sorted((directory / ADDITIONAL).glob("*.jinja"))}
    given = settings.get("chat_template")
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    else:
        named = {} if given is None else {DEFAULT: given}
    for name, source in named.items():
        if not isinstance(name, str) or not isinstance(source, str):
            raise CheckpointError(
                f"{settings_file}: chat_template must be a string, or a list of names and templates"
            )
        found.setdefault(name, (str(settings_file), source))
    if exists(file):
        found[DEFAULT] = (str(file), _read(file))
    elif named and DEFAULT not in found:
        raise CheckpointError(
            f"{settings_file}: chat_template must be a string, or a list with an entry named default"
        )
    return found, specials


def _read(path: Path) -> str:
    return read_text(path, LARGEST_TEMPLATE)


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)
