"""The tokenizer of a checkpoint for llama.cpp: tokens and their types by id, merges, and the name of the
splitting rule.

llama.cpp has a fixed set of named splitting rules. The rule of `tokenizer.json` is looked up; an unknown one
is refused, because a similar rule would silently split some texts differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint.jsonfile import read_object
from nanohybrid.errors import CheckpointError
from nanohybrid.text import ChatTemplate, Tokenizer
from nanohybrid.text.bytelevel import BYTE_TO_CHARACTER, SPLIT_PATTERN
from nanohybrid.text.tokenizer import EOS, TOKENIZER_FILE

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

UNUSED_BYTE = BYTE_TO_CHARACTER[0xFF]  # a byte that does not occur in UTF-8

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a rule -> the rule, and whether a part that is a token is used without merging
RULES: dict[str, tuple[str | None, bool]] = {
    "tekken": (SPLIT_PATTERN, True),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False),
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True),
    "gpt-2": (None, False),  # the built-in rule of ByteLevel
}


@dataclass(frozen=True)
class Vocabulary:
    """The values of the keys `tokenizer.*`."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    rule: str
    bos: int
    eos: int
    pad: int
    more_stops: list[int]  # further ids that end an answer
    add_bos: bool  # whether plain text starts with BOS
    template: str | None


def read_vocabulary(directory: Path, size: int) -> Vocabulary | None:
    """The tokenizer of a checkpoint whose model has `size` ids; None without tokenizer.json.

    Raises CheckpointError for a damaged tokenizer or a splitting rule that llama.cpp does not have.
    """
    path = directory / TOKENIZER_FILE
    if not path.exists():
        return None
    tokenizer = Tokenizer.from_directory(directory, size)
    raw = read_object(path)
    model = raw.get("model") or {}
    tokens, types = _tokens(tokenizer, model.get("vocab") or {}, raw.get("added_tokens") or [], size)
    stops = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    return Vocabulary(
        tokens, types, _merges(model), _rule(raw, path), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
        stops, _adds_bos(raw, directory), _template(directory, tokenizer),
    )  # fmt: skip


def _tokens(
    tokenizer: Tokenizer, vocab: dict[str, int], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """Token and type of each id of the model. Ids that the tokenizer lacks become unused padding tokens."""
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in vocab.items():
        tokens[number], types[number] = token, NORMAL
    for entry in added:
        if entry["id"] >= size:  # added without a resize of the model
            continue
        tokens[entry["id"]], types[entry["id"]] = (
            entry["content"],
            CONTROL if entry["id"] in tokenizer.special_tokens else USER_DEFINED,
        )
    return tokens, types


def _merges(model: dict[str, Any]) -> list[str]:
    """The merges as strings. llama.cpp needs at least one, so a vocabulary of bytes gets a merge that never
    applies."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return merges or [f"{UNUSED_BYTE} {UNUSED_BYTE}"]


def _rule(raw: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the splitting rule. Raises CheckpointError where it has none."""
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    whole = bool((raw.get("model") or {}).get("ignore_merges"))
    for name, (pattern, takes_whole) in RULES.items():
        if _is_rule(steps, pattern) and takes_whole == whole:
            return name
    raise CheckpointError(f"{path}: its splitting rule is not one of llama.cpp's ({', '.join(RULES)})")


def _is_rule(steps: list[dict[str, Any]], pattern: str | None) -> bool:
    *split, last = steps
    if (
        last.get("type") != "ByteLevel"
        or last.get("add_prefix_space")
        or bool(last.get("use_regex")) != (pattern is None)
    ):
        return False
    if pattern is None:
        return not split
    wanted = {"type": "Split", "pattern": {"Regex": pattern}, "invert": False}
    return (
        len(split) == 1
        and all(split[0].get(key) == value for key, value in wanted.items())
        and split[0].get("behavior") == "Isolated"
    )


def _adds_bos(raw: dict[str, Any], directory: Path) -> bool:
    """Whether transformers adds BOS: tokenizer_config.json decides, else the post-processor in
    tokenizer.json."""
    settings = directory / "tokenizer_config.json"
    setting = read_object(settings).get("add_bos_token") if settings.exists() else None
    if isinstance(setting, bool):
        return setting
    processor = raw.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in (step.get("single") or [{}])[0]:
            return True
    return False


def _template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The chat template of the checkpoint, else the built-in one if the vocabulary has its special tokens."""
    template = ChatTemplate.from_directory(directory)
    foreign = template is ChatTemplate.default() and tokenizer.id_of(EOS) is None
    return None if foreign else template.source
