"""Chat templates: messages to prompts, without special tokens from users.

A special token's name in a user's message must stay plain text. Escaping such names in the messages is not
enough: a template that joins or removes words can build a name out of two harmless halves. So the names in
the template are replaced, before it is compiled, by code words (a fence character, the token's id, the fence
again) that no message contains. What looks like a special token in the rendered text was then not written by
the template, and is encoded as plain text.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from nanohybrid.errors import CheckpointError, InputError
from nanohybrid.files import atomic_write
from nanohybrid.text.messages import Message, checked, checked_tools
from nanohybrid.text.sandbox import Sandbox
from nanohybrid.text.tokenizer import BOS, EOS, Tokenizer
from nanohybrid.text.training_pair import TrainingPair

TEMPLATE_FILE = "chat_template.jinja"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
_FENCES = [chr(code) for code in range(0xE000, 0xF900)]
_SWITCH = {True: "/think", False: "/no_think"}

Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A chat template.

    `name` is its name in error messages; `specials` are the values of bos_token and eos_token in it.
    """

    def __init__(
        self, source: str, name: str = TEMPLATE_FILE, specials: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.name = name
        self._specials = {"bos_token": BOS, "eos_token": EOS, **(specials or {})}
        self._flat = Sandbox(source, name)
        self._by_tokenizer: WeakKeyDictionary[Tokenizer, tuple[Sandbox, dict[str, str]]] = WeakKeyDictionary()

    @classmethod
    def default(cls) -> "ChatTemplate":
        """The built-in template, in the format of the released checkpoints, for models trained here."""
        return _default()

    @classmethod
    def from_directory(cls, directory: Path | str) -> "ChatTemplate":
        """The template of a checkpoint, or the built-in one where it has none.

        Raises CheckpointError for a damaged file.
        """
        directory = Path(directory)
        settings_file, file = directory / "tokenizer_config.json", directory / TEMPLATE_FILE
        settings = _settings(settings_file)
        specials = {name: _name(settings[name]) for name in ("bos_token", "eos_token") if settings.get(name)}
        if file.is_file():
            return cls(_read(file), str(file), specials)
        source = settings.get("chat_template")
        if isinstance(source, list):  # several templates by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return cls.default()
        if not isinstance(source, str):
            raise CheckpointError(
                f"{settings_file}: chat_template must be a string, or a list with an entry named default"
            )
        return cls(source, str(settings_file), specials)

    def save(self, directory: Path | str) -> None:
        """Write the template as `chat_template.jinja`."""
        atomic_write(Path(directory) / TEMPLATE_FILE, self.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        thinking: bool | None = None,
        generate: bool = True,
    ) -> str:
        """The prompt as text.

        thinking  True or False; None lets the messages decide (`/think`, `/no_think`)
        generate  whether the prompt ends with the start of the assistant's turn
        Raises InputError for messages, tools or a template that cannot be used.
        """
        return self._flat.render(**self._values(messages, tools, thinking, generate), **self._specials)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        thinking: bool | None = None,
        generate: bool = True,
    ) -> list[int]:
        """The prompt as ids: those of `render`, except that special tokens inside the messages are encoded as
        plain text."""
        values = self._values(messages, tools, thinking, generate)
        fence = _free_fence(values)
        sandbox, specials = self._fenced(tokenizer, fence)
        text = sandbox.render(**values, **specials)
        ids: list[int] = []
        for index, part in enumerate(text.split(fence)):
            if index % 2:
                ids.append(int(part))
            elif part:
                ids += tokenizer.encode(part, parse_special=False)
        return ids

    def training_pair(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        reasoning: str | None,
        answer: str,
        tools: Tools | None = None,
    ) -> TrainingPair:
        """A prompt and its target completion; `reasoning=None` is a completion without thinking."""
        thinking = reasoning is not None
        return TrainingPair.encode(
            tokenizer, self.encode(tokenizer, messages, tools, thinking), reasoning, answer
        )

    def _fenced(self, tokenizer: Tokenizer, fence: str) -> tuple[Sandbox, dict[str, str]]:
        """The template with code words for the special tokens of this tokenizer.

        Cached for the first fence only; others are rare.
        """
        known = self._by_tokenizer.get(tokenizer)
        if known is not None and fence == _FENCES[0]:
            return known

        def coded(text: str) -> str:
            return tokenizer.special_token_pattern.sub(
                lambda found: f"{fence}{tokenizer.id_of(found[0])}{fence}", text.replace(fence, "\ufffd")
            )

        made = (
            Sandbox(coded(self.source), self.name),
            {name: coded(text) for name, text in self._specials.items()},
        )
        if fence == _FENCES[0]:
            self._by_tokenizer[tokenizer] = made
        return made

    def _values(
        self, messages: Sequence[Message], tools: Tools | None, thinking: bool | None, generate: bool
    ) -> dict[str, Any]:
        ready = checked(messages)
        values: dict[str, Any] = {
            "messages": ready,
            "tools": checked_tools(tools),
            "add_generation_prompt": generate,
        }
        if thinking is None:
            return values
        if "enable_thinking" in self._flat.inputs or _SWITCH[thinking] not in self.source:
            return {**values, "enable_thinking": thinking}
        return {**values, "messages": _with_switch(ready, _SWITCH[thinking])}


def split_thinking(text: str, opened: bool = False) -> tuple[str | None, str]:
    """(reasoning, content) of a model's text; the first `</think>` ends the reasoning.

    opened: whether the prompt ends with `<think>`; a text without `</think>` is then reasoning that was cut
    off.
    """
    before, found, after = text.partition(THINK_CLOSE)
    starts = before.lstrip().startswith(THINK_OPEN)
    if not found and not starts and not opened:
        return None, text.strip()
    reasoning = before.lstrip().removeprefix(THINK_OPEN) if starts else before
    return reasoning.strip(), after.strip()


@functools.cache
def _default() -> ChatTemplate:
    source = resources.files("nanohybrid.text").joinpath("template.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, "nanohybrid's own")


def _with_switch(messages: list[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    """For templates that switch thinking by words only: append the word to the last user message, which takes
    precedence."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return [{"role": "system", "content": word}, *messages]
    changed = {**messages[last], "content": f"{messages[last]['content']} {word}"}
    return [*messages[:last], changed, *messages[last + 1 :]]


def _free_fence(values: Any) -> str:
    text = json.dumps(values, ensure_ascii=False, default=str)
    fence = next((character for character in _FENCES if character not in text), None)
    if fence is None:
        raise InputError(
            "the messages contain all private-use characters (U+E000 to U+F8FF); remove one of them"
        )
    return fence


# Files


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from None


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); is it truncated?") from None
    return value if isinstance(value, dict) else {}


def _name(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)
