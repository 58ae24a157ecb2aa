"""Structured output: a grammar says which tokens may come next, and all others are masked in the logits.

llguidance (https://github.com/guidance-ai/llguidance) compiles a JSON schema, a regular expression or a Lark
grammar into a matcher, which computes the mask of each step on the CPU. A grammar is compiled once; each
request advances a copy of it.

V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanohybrid.engine.params import StructuredOutputs
from nanohybrid.errors import InputError
from nanohybrid.extras import require
from nanohybrid.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Without optional white space, or a model could fill all its tokens with it.
COMPACT_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = json.dumps({"type": "object"})
CACHED_GRAMMARS = 8  # compiled grammars that are stored for the next request with the same structured outputs


class Grammar(NamedTuple):
    """A compiled grammar, in its initial state."""

    matcher: LLMatcher
    tokenizer: LLTokenizer


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to use from several threads.

    Making one takes about a second for a vocabulary of 128k tokens.

    vocab_size: width of the logits. stop_ids: ids that may end an answer, all below `vocab_size`.
    Raises InputError where there are none, MissingExtraError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        if not stop_ids:
            raise InputError("no id of this model ends an answer, and a structured output must end")
        guidance = require("llguidance", "serve")
        self._matcher: type[LLMatcher] = guidance.LLMatcher
        tokens = [
            tokenizer.token_bytes(number, skip_special_tokens=False) for number in range(tokenizer.vocab_size)
        ]
        wrapped = guidance.TokenizerWrapper(_Vocabulary(tokenizer, tokens))
        self._tokenizer: LLTokenizer = guidance.LLTokenizer(
            wrapped, n_vocab=vocab_size, eos_token=sorted(stop_ids)
        )
        self.compile = lru_cache(CACHED_GRAMMARS)(self._compile)

    def _compile(self, wanted: StructuredOutputs) -> Grammar:
        """The grammar of these structured outputs. Raises InputError where it cannot be compiled."""
        try:
            matcher = self._matcher(self._tokenizer, self._source(wanted), log_level=0)
        except ValueError as error:
            raise InputError(f"the grammar cannot be read: {str(error)[:200]}") from None
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise InputError(f"the grammar cannot be compiled: {reason}")
        return Grammar(matcher, self._tokenizer)

    def _source(self, wanted: StructuredOutputs) -> str:
        """The grammar in llguidance's own format."""
        if wanted.json is not None or wanted.json_object:
            schema = ANY_OBJECT if wanted.json is None else str(wanted.json)
            overrides: Any = COMPACT_JSON
            return self._matcher.grammar_from_json_schema(schema, overrides=overrides)
        if wanted.regex is not None:
            return self._matcher.grammar_from_regex(wanted.regex)
        if wanted.choice is not None:
            return self._matcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, wanted.choice))}")
        return self._matcher.grammar_from_lark(wanted.grammar or "")


class GrammarState:
    """The position of one answer in its grammar.

    `error` is set where llguidance gives up in the middle of the answer, since its automaton exceeds the
    limits.
    """

    def __init__(self, grammar: Grammar, prefix: bytes = b"") -> None:
        """prefix: text of the answer that was written before its first whole token."""
        self.error: str | None = None
        self._matcher, self._vocab_size = grammar.matcher.deep_copy(), grammar.tokenizer.vocab_size
        self._consumed = 0
        if prefix:
            self._matcher.consume_tokens(grammar.tokenizer.tokenize_bytes(prefix))

    def allowed(self, tokens: Sequence[int]) -> np.ndarray:
        """Which ids may follow the answer `tokens`, bool [V]. `tokens` extends what the last call was given.

        After an error only the end of the text is allowed.
        """
        self._matcher.consume_tokens(list(tokens[self._consumed :]))
        self._consumed = len(tokens)
        bitmask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.error = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]
        return np.unpackbits(bitmask, bitorder="little", count=self._vocab_size).view(bool)


class _Vocabulary:
    """A tokenizer in the form that llguidance takes."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        self.tokens, self._tokenizer = tokens, tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_tokens)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(
            text.decode("utf-8", "replace") if isinstance(text, bytes) else text, parse_special=False
        )
