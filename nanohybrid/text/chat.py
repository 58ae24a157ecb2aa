"""Chat templates: messages to prompts, without special tokens from users.

A special token's name in a user's message must stay plain text. Escaping such names in the messages is not
enough: a template that joins or removes words can build a name out of two harmless halves. So the names in
the template are replaced, before it is compiled, by code words (a fence character, the token's id, the fence
again) that no message contains. What looks like a special token in the rendered text was then not written by
the template, and is encoded as plain text.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write
from nanohybrid.text.messages import Message, checked, checked_tools, with_argument_objects
from nanohybrid.text.sandbox import Sandbox
from nanohybrid.text.template_files import ADDITIONAL, DEFAULT, TEMPLATE_FILE, TOOL_USE, read_templates
from nanohybrid.text.tokenizer import BOS, EOS, Tokenizer
from nanohybrid.text.tool_format import ToolFormat, tool_format
from nanohybrid.text.training_pair import TrainingPair

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
_FENCES = [chr(code) for code in range(0xE000, 0xF900)]
_ASKS_FOR_TYPE = re.compile(r"arguments\s+is\s+(?:not\s+)?(?:string|mapping)")
_OWN_TOKENS = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")
_SWITCH = {True: "/think", False: "/no_think"}

Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A chat template.

    `name` is its name in error messages; `specials` are the values of bos_token and eos_token in it.
    `tool_use` is the source of the template for conversations with tools, where it is another one.
    """

    def __init__(
        self,
        source: str,
        name: str = TEMPLATE_FILE,
        specials: Mapping[str, str] | None = None,
        tool_use: str | None = None,
    ) -> None:
        self.source = source
        self.name = name
        self.tool_use = None if tool_use is None else ChatTemplate(tool_use, f"{name} (tool_use)", specials)
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
        found, specials = read_templates(Path(directory))
        if DEFAULT not in found:
            return cls.default()
        (name, source), (_, tool_use) = found[DEFAULT], found.get(TOOL_USE, ("", None))
        return cls(source, name, specials, tool_use)

    @property
    def is_default(self) -> bool:
        """Whether this is the built-in template."""
        return self is _default()

    @functools.cached_property
    def can_think(self) -> bool:
        """Whether the template has a thinking trace, or a switch for one."""
        return "enable_thinking" in self._flat.inputs or any(
            word in self.source for word in (THINK_OPEN, THINK_CLOSE, *_SWITCH.values())
        )

    @functools.cached_property
    def model_opens_thinking(self) -> bool:
        """Whether the model writes the `<think>` of its traces itself, as Qwen3 does."""
        if THINK_OPEN not in self.source and THINK_CLOSE not in self.source:
            return False
        try:
            prompt = self.render([{"role": "user", "content": "a"}], thinking=True)
        except InputError:  # it cannot show the simplest conversation: nothing is known
            return False
        return not prompt.rstrip().endswith(THINK_OPEN)

    @functools.cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes tool calls; None where the template shows no format that is known."""
        source = self.source if self.tool_use is None else self.tool_use.source
        return tool_format(source)

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raise InputError for the built-in template and a vocabulary without its special tokens."""
        names = set(tokenizer.special_tokens.values())
        if self.is_default and not names.issuperset(_OWN_TOKENS):
            raise InputError(
                f"the model has no chat template, and its vocabulary has no {_OWN_TOKENS[0]}, which the "
                f"built-in one needs: put the {TEMPLATE_FILE} of the model beside its weights"
            )

    def save(self, directory: Path | str) -> None:
        """Write the template as `chat_template.jinja`, one for tools beside it."""
        atomic_write(Path(directory) / TEMPLATE_FILE, self.source)
        if self.tool_use is not None:
            (Path(directory) / ADDITIONAL).mkdir(exist_ok=True)
            atomic_write(Path(directory) / ADDITIONAL / f"{TOOL_USE}.jinja", self.tool_use.source)

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
        if tools and self.tool_use is not None:
            return self.tool_use.render(messages, tools, thinking, generate)
        values = self._values(messages, tools, thinking, generate)
        return self._rendered(self._flat, values, self._specials, thinking)

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
        if tools and self.tool_use is not None:
            return self.tool_use.encode(tokenizer, messages, tools, thinking, generate)
        self.check_vocabulary(tokenizer)
        values = self._values(messages, tools, thinking, generate)
        fence = _free_fence(values)
        sandbox, specials = self._fenced(tokenizer, fence)
        text = self._rendered(sandbox, values, specials, thinking)
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
        values: dict[str, Any] = {
            "messages": checked(messages),
            "tools": checked_tools(tools),
            "add_generation_prompt": generate,
        }
        if thinking and not self.can_think:
            raise InputError(f"{self.name}: this chat template has no thinking to turn on")
        if values["tools"] and "tools" not in self._flat.inputs:
            raise InputError(f"{self.name}: this chat template does not show tools to the model")
        if thinking is not None and not self._is_switched_by_word(thinking):
            values["enable_thinking"] = thinking
        return values

    def _is_switched_by_word(self, thinking: bool) -> bool:
        """Whether only a word in the messages, `/think` or `/no_think`, turns thinking on or off."""
        return "enable_thinking" not in self._flat.inputs and _SWITCH[thinking] in self.source

    def _rendered(
        self, sandbox: Sandbox, values: dict[str, Any], specials: Mapping[str, str], thinking: bool | None
    ) -> str:
        """The prompt of a sandbox that holds this template, with thinking as it was asked for."""
        if thinking is None or not self._is_switched_by_word(thinking):
            return self._with_arguments(sandbox, {**values, **specials})
        messages = _with_switch(values["messages"], _SWITCH[thinking])
        text = self._with_arguments(sandbox, {**values, **specials, "messages": messages})
        if not values["add_generation_prompt"]:
            return text
        # A word of the user may have switched it after all: the published template sees /think in </think>.
        asked, other = (_turn_start(sandbox, specials, wanted) for wanted in (thinking, not thinking))
        if not text.endswith(asked) and text.endswith(other):
            text = text[: len(text) - len(other)] + asked
        return text

    def _with_arguments(self, sandbox: Sandbox, values: dict[str, Any]) -> str:
        """Render, with the arguments of earlier tool calls in the form that the template takes.

        Clients send JSON text. Most templates want an object (`arguments | items`, `arguments | tojson`);
        some join strings; those that ask which it is get what was sent.
        """
        objects = with_argument_objects(values["messages"])
        if objects is None or _ASKS_FOR_TYPE.search(self.source):
            return sandbox.render(**values)
        try:
            return sandbox.render(**{**values, "messages": objects})
        except InputError:
            return sandbox.render(**values)


def _turn_start(sandbox: Sandbox, specials: Mapping[str, str], thinking: bool) -> str:
    """What a template adds to begin the assistant's turn."""
    messages = [{"role": "user", "content": f"a {_SWITCH[thinking]}"}]
    values = {"messages": messages, "tools": None, **specials}
    before, after = (sandbox.render(**values, add_generation_prompt=generate) for generate in (False, True))
    return after.removeprefix(before)


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
