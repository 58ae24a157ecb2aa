"""A checkpoint's tokenizer as llama.cpp wants it: tokens and their types by id, merges, and the name of the splitting rule.

llama.cpp has splitting rules by name and no others, so the one in `tokenizer.json` is looked up; one that has no name is refused,
since a rule that is almost the same cuts some texts differently and says nothing.
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

NEVER = BYTE_TO_CHARACTER[0xFF]  # a byte that UTF-8 does not have

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a rule -> the rule, and whether a piece that is a token is taken whole, without merging
RULES: dict[str, tuple[str | None, bool]] = {
    "tekken": (SPLIT_PATTERN, True),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False),
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True),
    "gpt-2": (None, False),  # ByteLevel's own
}


@dataclass(frozen=True)
class Vocabulary:
    """What the keys `tokenizer.*` of the file say."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    rule: str
    bos: int
    eos: int
    pad: int
    more_stops: list[int]  # ids that end an answer too
    add_bos: bool  # whether plain text begins with the BOS token
    template: str | None


def read_vocabulary(directory: Path, size: int) -> Vocabulary | None:
    """The tokenizer of a checkpoint whose model has `size` ids; None where there is no tokenizer.json."""
    path = directory / TOKENIZER_FILE
    if not path.exists():
        return None
    tokenizer = Tokenizer.from_directory(directory, size)
    raw = read_object(path)
    model = raw.get("model") or {}
    tokens, types = _tokens(tokenizer, model.get("vocab") or {}, raw.get("added_tokens") or [], size)
    stops = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    return Vocabulary(
        tokens, types, _merges(model), _rule(raw, path), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, stops,
        _adds_bos(raw, directory), _template(directory, tokenizer),
    )  # fmt: skip


def _tokens(
    tokenizer: Tokenizer, vocab: dict[str, int], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """Every id of the model has a token: those that the tokenizer lacks are padding that no text becomes."""
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in vocab.items():
        tokens[number], types[number] = token, NORMAL
    for entry in added:
        tokens[entry["id"]], types[entry["id"]] = (
            entry["content"],
            CONTROL if entry["id"] in tokenizer.special_tokens else USER_DEFINED,
        )
    return tokens, types


def _merges(model: dict[str, Any]) -> list[str]:
    """The merges, each as one text. llama.cpp refuses a file without any, so a vocabulary of bytes alone gets one that no text meets."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return merges or [f"{NEVER} {NEVER}"]


def _rule(raw: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for how texts are cut into pieces."""
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    whole = bool((raw.get("model") or {}).get("ignore_merges"))
    for name, (pattern, takes_whole) in RULES.items():
        if _is_rule(steps, pattern) and takes_whole == whole:
            return name
    raise CheckpointError(
        f"{path}: cuts texts by a rule that llama.cpp has no name for; known are {', '.join(RULES)}"
    )


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
    """What transformers does with the same files: tokenizer_config.json decides, else a template for whole texts in tokenizer.json."""
    settings = directory / "tokenizer_config.json"
    said = read_object(settings).get("add_bos_token") if settings.exists() else None
    if isinstance(said, bool):
        return said
    processor = raw.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in (step.get("single") or [{}])[0]:
            return True
    return False


def _template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The checkpoint's own, else ours where the vocabulary has its special tokens."""
    template = ChatTemplate.from_directory(directory)
    foreign = template is ChatTemplate.default() and tokenizer.id_of(EOS) is None
    return None if foreign else template.source
