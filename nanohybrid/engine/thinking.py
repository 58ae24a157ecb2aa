"""The thinking budget of Nemotron Nano 2 (section 3.4 of its report), applied inside the decoding loop.

After `budget` tokens the trace ends at the next newline, and `grace` tokens later at the latest. `</think>`
can be spelled by many sequences of ids (`</think>`, `</think>\\n\\n` and ` </think>` are different tokens),
so the bytes of the text are watched, not ids. Where the model has begun to write `</think>`, what is inserted
completes it.

Most prompts end in `<think>`. Other models (Qwen3) write it themselves, at the beginning of their answer.
"""

from collections.abc import Sequence

from nanohybrid.engine.params import ThinkingEnd
from nanohybrid.text import Tokenizer

OPEN, CLOSE = b"<think>", b"</think>"
TAIL = 32  # bytes of text that are remembered: a tag and the white space of a line


def prompt_tail(tokenizer: Tokenizer, prompt: Sequence[int]) -> bytes:
    """The last bytes of a prompt's text, enough to see whether it leaves a thinking trace open."""
    return b"".join(tokenizer.token_bytes(token) for token in prompt[-TAIL:])


def opens(tail: bytes) -> bool:
    """Whether a prompt whose text ends in `tail` leaves a thinking trace open."""
    return tail.rstrip().endswith(OPEN)


def closes(tail: bytes) -> bool:
    """Whether a prompt whose text ends in `tail` holds a trace that has ended: thinking is off."""
    return tail.rstrip().endswith(CLOSE)


def closing(tail: bytes) -> str:
    """The text that ends a trace whose text ends in `tail`.

    It completes one `</think>` on a line of its own, followed by an empty line.
    """
    begun = next((n for n in range(len(CLOSE) - 1, 0, -1) if tail.endswith(CLOSE[:n])), 0)
    if begun:
        return CLOSE[begun:].decode() + "\n\n"
    after_newline = tail.rstrip(b" \t").endswith(b"\n")
    return ("" if after_newline else "\n") + CLOSE.decode() + "\n\n"


class Thinking:
    """Watches one trace. `active` becomes false when the trace ends, or where there is none.

    tail: the end of the prompt. opened: whether it opens the trace; else the answer may begin with `<think>`.
    budget: tokens of the trace; None: no limit. A budget of 0 ends it before the first token. grace: further
    tokens in which a newline is awaited. `tokens` counts the sampled tokens of the trace, `</think>`
    included.
    """

    __slots__ = ("_begun", "_budget", "_limit", "_tail", "active", "end", "tokens")

    def __init__(
        self, tail: bytes, budget: int | None = None, grace: int = 0, *, opened: bool = True
    ) -> None:
        self.active = True
        self._begun: bytes | None = None if opened else b""  # of an answer that may begin with `<think>`
        self.end: ThinkingEnd = "none"
        self.tokens = 0
        self._budget = float("inf") if budget is None else budget
        self._limit = self._budget + (grace if budget else 0)
        self._tail = tail[max(tail.rfind(OPEN), 0) :][-TAIL:]  # without a `</think>` of an earlier turn

    def begin(self) -> str | None:
        """The text to insert before the first token: where the budget is 0, the end of the trace."""
        if self._budget != 0:
            return None
        opening = "" if self._begun is None else self.open()
        return opening + self._close(newline=self._tail.rstrip(b" \t").endswith(b"\n"))

    def open(self) -> str:
        """Open a trace that the answer would have to open itself. Returns the text to insert."""
        self._begun, self._tail = None, OPEN + b"\n"
        return self._tail.decode()

    def push(self, piece: bytes) -> str | None:
        """Add the bytes of one sampled token. Returns the text to insert where the budget ends the trace."""
        if self._begun is not None:
            self._await_open(self._begun + piece)
            return None
        self.tokens += 1
        tail = self._tail + piece
        if CLOSE in tail:
            self.active, self.end = False, "natural"
            return None
        self._tail = tail[-TAIL:]
        if self.tokens < self._budget:
            return None
        newline = b"\n" in piece
        return self._close(newline) if newline or self.tokens >= self._limit else None

    def _await_open(self, begun: bytes) -> None:
        """Read an answer that may still begin with `<think>`."""
        self._begun, text = begun, begun.lstrip()
        if text.startswith(OPEN):
            self._begun, self._tail = None, text[-TAIL:]
            if CLOSE in text:
                self.active, self.end = False, "natural"
        elif not OPEN.startswith(text):
            self.active = False

    def _close(self, newline: bool) -> str:
        self.active, self.end = False, "newline" if newline else "forced"
        return closing(self._tail)
