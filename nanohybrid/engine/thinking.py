"""The paper's thinking budget, inside the decoding loop and on the text, not on ids.

After `budget` tokens the trace ends at the next newline, `grace` tokens later at the latest. `</think>` can be spelled
in many ways in ids (`</think>`, `</think>\\n\\n` and ` </think>` are different tokens), so the bytes are watched; and what
is inserted continues a `</think>` that the model had begun.
"""

from nanohybrid.engine.params import ThinkingEnd

OPEN, CLOSE = b"<think>", b"</think>"
KEPT = 32  # bytes of text remembered: a `</think>` and the blanks of a line


def opens(tail: bytes) -> bool:
    """Whether a prompt that ends in these bytes leaves a trace open."""
    return tail.rstrip().endswith(OPEN)


def closing(tail: bytes) -> str:
    """What ends a trace whose text ends in `tail`: exactly one `</think>` on a line of its own, and an empty line."""
    begun = next((n for n in range(len(CLOSE) - 1, 0, -1) if tail.endswith(CLOSE[:n])), 0)
    if begun:
        return CLOSE[begun:].decode() + "\n\n"
    after_newline = tail.rstrip(b" \t").endswith(b"\n")
    return ("" if after_newline else "\n") + CLOSE.decode() + "\n\n"


class Thinking:
    """Watches one open trace. Once `active` is false it has ended (or the request has) and nothing is left to do."""

    __slots__ = ("_budget", "_limit", "_tail", "active", "end", "tokens")

    def __init__(self, tail: bytes, budget: int | None = None, grace: int = 0) -> None:
        self.active = True
        self.end: ThinkingEnd = "none"
        self.tokens = 0
        self._budget = float("inf") if budget is None else budget
        self._limit = self._budget + (grace if budget else 0)  # a budget of 0 does not wait for a newline
        self._tail = tail[max(tail.rfind(OPEN), 0) :][-KEPT:]  # a `</think>` of an earlier turn is not ours

    def begin(self) -> str | None:
        """What to insert before the first token is sampled: `</think>` where the budget is 0."""
        return self._close(newline=self._tail.rstrip(b" \t").endswith(b"\n")) if self._budget == 0 else None

    def push(self, piece: bytes) -> str | None:
        """Take the bytes of one sampled token; returns the text to insert where the budget ends the trace here."""
        self.tokens += 1
        tail = self._tail + piece
        if CLOSE in tail:
            self.active, self.end = False, "natural"
            return None
        self._tail = tail[-KEPT:]
        if self.tokens < self._budget:
            return None
        newline = b"\n" in piece
        return self._close(newline) if newline or self.tokens >= self._limit else None

    def _close(self, newline: bool) -> str:
        self.active, self.end = False, "newline" if newline else "forced"
        return closing(self._tail)
