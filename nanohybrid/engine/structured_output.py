"""Answers that must have a form: a grammar says which tokens may come next, and the others are cut from the logits.

llguidance compiles the grammar (off the event loop, under the deadline of `--prepare-seconds`) and computes the masks. With
thinking on, the grammar binds only after the trace has ended; what the budget writes is never touched.
"""

import copy
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanohybrid.engine.request import Request
from nanohybrid.engine.runner import Runner
from nanohybrid.engine.sampler import Rows
from nanohybrid.errors import InputError
from nanohybrid.extras import require
from nanohybrid.text import THINK_CLOSE, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TIGHT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # else a model may write blanks for ever
THINK_CLOSE_TOKENS = 16  # `</think>` takes no more tokens than this


class Grammars:
    """Compiles grammars for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        guidance = require("llguidance", "serve")
        self._matcher: type[LLMatcher] = guidance.LLMatcher
        tokens = [
            tokenizer.token_bytes(number, skip_special_tokens=False) for number in range(tokenizer.vocab_size)
        ]
        wrapped = guidance.TokenizerWrapper(_Vocabulary(tokenizer, tokens))
        self._tokenizer: LLTokenizer = guidance.LLTokenizer(
            wrapped, n_vocab=vocab_size, eos_token=sorted(stop_ids) or [tokenizer.eos_id]
        )

    def schema(self, schema: dict[str, Any]) -> "LLMatcher":
        """JSON that holds to a schema. Raises InputError where that cannot be compiled."""
        try:
            grammar = self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=TIGHT)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"the schema cannot be read: {str(error)[:200]}") from None
        return self._compiled(grammar)

    def regex(self, pattern: str) -> "LLMatcher":
        """Text that matches a regular expression as a whole."""
        return self._compiled(self._matcher.grammar_from_regex(pattern))

    def choice(self, texts: list[str]) -> "LLMatcher":
        """One of these texts."""
        return self._compiled(self._matcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, texts))}"))

    def call(self, tools: dict[str, dict[str, Any]]) -> "LLMatcher":
        """One call of one of these tools: names to schemas of arguments."""
        lines = [f"start: {' | '.join(f'call{index}' for index in range(len(tools)))}"]
        for index, (name, schema) in enumerate(tools.items()):
            head = json.dumps(f'<TOOLCALL>[{{"name": {json.dumps(name)}, "arguments": ')
            lines.append(f'call{index}: {head} arguments{index} "}}]</TOOLCALL>"')
            lines.append(
                f"arguments{index}: %json {json.dumps({'type': 'object', **schema, 'x-guidance': TIGHT})}"
            )
        return self._compiled(self._matcher.grammar_from_lark("\n".join(lines)))

    def guide(self, matcher: "LLMatcher") -> "Guide":
        """A fresh one for a choice."""
        return Guide(matcher.deep_copy(), self._tokenizer)

    def _compiled(self, grammar: str) -> "LLMatcher":
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"the form cannot be kept: {' '.join(matcher.get_error().split())[:300]}")
        return matcher


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        self.tokens, self._tokenizer = tokens, tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_tokens)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(
            text.decode("utf-8", "replace") if isinstance(text, bytes) else text, parse_special=False
        )


class Guide:
    """A grammar on its way through one answer."""

    def __init__(self, matcher: "LLMatcher", tokenizer: "LLTokenizer") -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self.broken: str | None = (
            None  # why the grammar was given up in mid-answer: llguidance bounds what it may grow to
        )
        self._bound = False
        self._at = 0

    def mask(self, request: Request, vocab_size: int, token_bytes: Any) -> Tensor | None:
        """Which tokens may come next; None where any may. A trace may say what it likes, but not end the answer that must follow."""
        if request.forced:
            return None
        if request.thinking is not None and request.thinking.active:
            going_on_V = torch.ones(vocab_size, dtype=torch.bool)
            going_on_V[[token for token in request.stop_ids if token < vocab_size]] = False
            return going_on_V
        if not self._bound:
            self._bind(request, token_bytes)
        self._matcher.consume_tokens(request.tokens[self._at :])
        self._at = len(request.tokens)
        bits = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little"
        )
        if self._matcher.is_error():  # only the end is allowed now
            self.broken = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]
        return torch.from_numpy(bits[:vocab_size].astype(bool))

    def _bind(self, request: Request, token_bytes: Any) -> None:
        """The answer begins: at the first token, or with what the token that ended the trace said beyond `</think>`."""
        self._bound, self._at = True, len(request.tokens)
        if request.tokens:
            said = b"".join(map(token_bytes, request.tokens[-THINK_CLOSE_TOKENS:]))
            begun = said.rpartition(THINK_CLOSE.encode())[2].lstrip()
            if begun:
                self._matcher.consume_tokens(self._tokenizer.tokenize_bytes(begun))


class GuidedRunner(Runner):
    """Takes the place of an engine's runner, over the same memory: the rows of guided requests get a mask each step."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer) -> None:
        self.__dict__.update(runner.__dict__)
        self.guides: dict[int, Guide] = {}  # by the id of the request
        self._token_bytes = tokenizer.token_bytes

    def _edited(self, rows: Rows, ready: list[Request]) -> Rows:
        if not self.guides:
            return rows
        size = self.model.config.vocab_size
        guided = [
            (row, self.guides[request.id]) for row, request in enumerate(ready) if request.id in self.guides
        ]
        masks = [(row, guide.mask(ready[row], size, self._token_bytes)) for row, guide in guided]
        bound = [(row, mask) for row, mask in masks if mask is not None]
        if not bound:
            return rows
        masked = copy.copy(rows)
        masked.edits = _Masked(rows.edits, bound)  # type: ignore[assignment]
        return masked


class _Masked:
    """Edits of logits, and after them the masks."""

    def __init__(self, edits: Any, masks: list[tuple[int, Tensor]]) -> None:
        self._edits, self._masks = edits, masks

    def apply(self, logits_SV: Tensor) -> Tensor:
        logits_SV = logits_SV.clone() if self._edits is None else self._edits.apply(logits_SV)
        for row, mask_V in self._masks:
            logits_SV[row].masked_fill_(~mask_V.to(logits_SV.device), float("-inf"))
        return logits_SV
