"""The tokenizer of a checkpoint for llama.cpp: tokens and their types by id, merges, and the name of the
splitting rule.

llama.cpp has a fixed set of named splitting rules. The rule of `tokenizer.json` is looked up; an unknown one
is refused, because a similar rule would silently split some texts differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanohybrid.errors import CheckpointError
from nanohybrid.gguf.splitting import DIGIT, GPT2, RULES, rule_names
from nanohybrid.text import ChatTemplate, Tokenizer
from nanohybrid.text.bytelevel import BYTE_TO_CHARACTER
from nanohybrid.text.settings import exists, read_settings
from nanohybrid.text.tokenizer import EOS, TOKENIZER_FILE

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

UNUSED_BYTE = BYTE_TO_CHARACTER[0xFF]  # a byte that does not occur in UTF-8


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
    if not exists(path):
        return None
    tokenizer = Tokenizer.from_directory(directory, size)
    raw = read_settings(path)
    model = raw.get("model") or {}
    tokens, types = _tokens(tokenizer, model.get("vocab") or {}, raw.get("added_tokens") or [], size)
    stops = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    return Vocabulary(
        tokens, types, _merges(model), _rule(raw, path), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
        stops, tokenizer.adds_bos, _template(directory, tokenizer),
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
    found = _patterns(raw.get("pre_tokenizer") or {})
    whole = bool((raw.get("model") or {}).get("ignore_merges"))
    for name, rule in RULES.items():
        if found == rule.patterns and rule.whole_tokens == whole:
            return name
    known = ", ".join(rule_names())
    raise CheckpointError(f"{path}: its splitting rule is not one of llama.cpp's ({known})")


def _patterns(pre_tokenizer: dict[str, Any]) -> tuple[str, ...] | None:
    """The expressions of a pre-tokenizer of tokenizer.json, in their order; None for another kind of it."""
    *before, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found = [_pattern(step) for step in before] + ([GPT2] if last.get("use_regex") else [])
    return tuple(one for one in found if one is not None) if None not in found else None


def _pattern(step: dict[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    isolated = (
        step.get("type") == "Split" and step.get("behavior") == "Isolated" and step.get("invert") is False
    )
    found = (step.get("pattern") or {}).get("Regex")
    return found if isolated and isinstance(found, str) else None


def _template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The chat template of the checkpoint, else the built-in one if the vocabulary has its special tokens."""
    template = ChatTemplate.from_directory(directory)
    foreign = template is ChatTemplate.default() and tokenizer.id_of(EOS) is None
    return None if foreign else template.source
