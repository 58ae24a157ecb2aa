"""The rules by which llama.cpp splits a text before BPE, by the names in `tokenizer.ggml.pre`.

A rule is a list of regular expressions: each splits what the ones before it left, into its matches and the
text between them. The expressions are those of the models' own tokenizer.json. llama.cpp's differ in form,
and for tekken also in combining marks, which its form does not count as letters.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# The rule of tekken: words that start in upper case or end in lower case (with one punctuation character or
# space before them), single digits, punctuation with the newlines after it, and white space.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BEFORE_A_WORD = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = "|".join(
    (
        rf"{_BEFORE_A_WORD}[{_UPPER}]*[{_LOWER}]+",
        rf"{_BEFORE_A_WORD}[{_UPPER}]+[{_LOWER}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@dataclass(frozen=True)
class SplittingRule:
    """patterns: the expressions in their order. whole_tokens: a part that is a token is used without merging.
    adds_bos: whether plain text starts with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_tokens: bool = False
    adds_bos: bool = False


_FAMILIES: list[tuple[SplittingRule, tuple[str, ...]]] = [
    (SplittingRule((TEKKEN,), True, True), ("tekken",)),
    (SplittingRule((_QWEN2,)), ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2")),
    (
        SplittingRule((_LLAMA3,), True, True),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    (SplittingRule((_LLAMA3,)), ("smaug-bpe", "dbrx")),
    (
        SplittingRule((DIGIT, GPT2)),
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    (SplittingRule((GPT2,)), ("gpt-2", "phi-2", "gigachat", "mpt", "olmo", "jais", "exaone4", "trillion")),
    (SplittingRule(_DEEPSEEK), ("deepseek-v3", "hunyuan-dense", "joyai-llm")),
    (SplittingRule(_DEFAULT), ("default",)),
]
RULES = {name: rule for rule, names in _FAMILIES for name in names}
"""llama.cpp's name of a rule -> the rule; of several names for one rule the first is written."""


def rule_names() -> list[str]:
    """One name for each rule, that under which it is written."""
    return [names[0] for _, names in _FAMILIES]
