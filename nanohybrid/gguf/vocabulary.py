"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`, and the ids that end answers.

Only byte-level BPE is supported, which llama.cpp calls `gpt2`. A token of type control becomes a special
token, a user-defined one an added token that is not special, and an unused one is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanohybrid.errors import shown
from nanohybrid.gguf.configuration import token_id
from nanohybrid.gguf.header import GgufFile
from nanohybrid.gguf.splitting import DIGIT, GPT2, RULES, SplittingRule

PREFIX = "tokenizer.ggml"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NO_TOKENIZER = ("none", "no_vocab")
END_TOKENS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>",
    )
)  # fmt: skip
"""Tokens that end an answer by their name, as in llama.cpp, whatever the file says of them."""


def has_tokenizer(file: GgufFile) -> bool:
    """Whether a file has a tokenizer, supported or not."""
    return file.metadata.get(f"{PREFIX}.model", NO_TOKENIZER[0]) not in NO_TOKENIZER


def tokenizer_json(file: GgufFile) -> dict[str, Any]:
    """The object of a tokenizer.json.

    Raises CheckpointError for a tokenizer that is not byte-level BPE, an unknown splitting rule, and tables
    that do not fit together.
    """
    rule = splitting_rule(file)
    tokens, types = list(file.strings(f"{PREFIX}.tokens")), _types(file)
    if len(types) != len(tokens):
        raise file.wrong(f"has {len(tokens):,} tokens and {len(types):,} types of tokens")
    used = [number for number, kind in enumerate(types) if kind != UNUSED]
    vocabulary = {tokens[number]: number for number in used}
    if len(vocabulary) < len(used):
        again = next(number for number in used if vocabulary[tokens[number]] != number)
        raise file.wrong(
            f"the token {shown(tokens[again])} has the ids {again} and {vocabulary[tokens[again]]}"
        )
    added = [
        _added(number, tokens[number], types[number] != USER_DEFINED or tokens[number] in END_TOKENS)
        for number in used
        if types[number] in (CONTROL, UNKNOWN, USER_DEFINED) or tokens[number] in END_TOKENS
    ]
    bos = token_id(file, "bos_token_id")
    start = None if bos is None or not adds_bos(file) else _start(tokens[bos], bos)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(rule), "post_processor": start, "decoder": _BYTES,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": rule.whole_tokens, "vocab": vocabulary, "merges": _merges(file, vocabulary),
        },
    }  # fmt: skip


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The object of a tokenizer_config.json, with the chat templates where there are several."""
    result: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos(file),
    }  # fmt: skip
    tokens = list(file.strings(f"{PREFIX}.tokens"))
    for name in ("bos_token", "eos_token", "pad_token"):
        number = token_id(file, f"{name}_id")
        if number is not None and number < len(tokens):
            result[name] = tokens[number]
    named = _named_templates(file)
    if named:
        result["chat_template"] = [{"name": name, "template": source} for name, source in named.items()]
    return result


def chat_template(file: GgufFile) -> str | None:
    """The chat template; None where the file has none, or several (tokenizer_config)."""
    key = "tokenizer.chat_template"
    return None if key not in file.metadata or _named_templates(file) else file.text(key)


def stop_ids(file: GgufFile) -> list[int]:
    """The ids that end an answer: EOS first, then the ends of turns and messages, and those known by name."""
    named = (token_id(file, name) for name in ("eos_token_id", "eot_token_id", "eom_token_id"))
    found = [number for number in named if number is not None]
    if f"{PREFIX}.tokens" in file.metadata:
        tokens = file.strings(f"{PREFIX}.tokens")
        found += [number for number, token in enumerate(tokens) if token in END_TOKENS]
    return list(dict.fromkeys(found))


def adds_bos(file: GgufFile) -> bool:
    """Whether plain text begins with BOS: as the file says, else as its splitting rule does."""
    said = file.flag(f"{PREFIX}.add_bos_token")
    return splitting_rule(file).adds_bos if said is None else said


def splitting_rule(file: GgufFile) -> SplittingRule:
    """The rule that `tokenizer.ggml.pre` names.

    Raises CheckpointError where it is unknown, or the tokenizer is not byte-level BPE.
    """
    model = file.text(f"{PREFIX}.model")
    if model != "gpt2":
        called = {"llama": "SentencePiece (llama)", "bert": "WordPiece (bert)"}.get(model, shown(model))
        raise file.wrong(
            f"its tokenizer is {called}; only byte-level BPE (gpt2) is supported, as Llama 3, Qwen3, SmolLM2 "
            "and Nemotron have it"
        )
    pre = file.text(f"{PREFIX}.pre") if f"{PREFIX}.pre" in file.metadata else "default"
    if pre not in RULES:
        raise file.wrong(
            f"{PREFIX}.pre is {shown(pre)}, an unknown splitting rule; known are {', '.join(RULES)}"
        )
    return RULES[pre]


def _types(file: GgufFile) -> list[int]:
    key = f"{PREFIX}.token_type"
    if key not in file.metadata:
        return [NORMAL] * len(file.strings(f"{PREFIX}.tokens"))
    return [int(kind) for kind in file.wholes(key)]


def _merges(file: GgufFile, vocabulary: Mapping[str, int]) -> list[list[str]]:
    """The merges whose parts and result are tokens; the library refuses others, which can never apply."""
    merges = [merge.split(" ") for merge in file.strings(f"{PREFIX}.merges")]
    wrong = next((number for number, parts in enumerate(merges) if len(parts) != 2), None)
    if wrong is not None:
        raise file.wrong(f"{PREFIX}.merges: entry {wrong} is not two tokens")
    return [merge for merge in merges if {*merge, "".join(merge)} <= vocabulary.keys()]


def _named_templates(file: GgufFile) -> dict[str, str]:
    """Templates by name with `default` among them; empty where the file has one template at most."""
    first = "tokenizer.chat_template"
    named = {key[len(first) + 1 :]: file.text(key) for key in file.metadata if key.startswith(f"{first}.")}
    if not named:
        return {}
    return {"default": file.text(first), **named} if first in file.metadata else named


def _added(number: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": special}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _pre_tokenizer(rule: SplittingRule) -> dict[str, Any]:
    """The rule as tokenizer.json has it; GPT-2's expression and single digits by their own names there."""
    *before, last = rule.patterns
    if last == GPT2:
        steps = [*map(_split, before), {**_BYTES, "use_regex": True}]
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    return {"type": "Sequence", "pretokenizers": [*map(_split, rule.patterns), _BYTES]}


def _split(pattern: str) -> dict[str, Any]:
    if pattern == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _start(token: str, number: int) -> dict[str, Any]:
    """A post-processor that puts BOS before a text."""
    bos, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [bos, text, {"Sequence": {"id": "B", "type_id": 0}}]
    known = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": pair, "special_tokens": known}
