"""The text of a request while it is written: whole characters only, with stop strings held back.

Text that may be the beginning of a stop string is not released, and the text is cut before the stop string.
Which
one counts does not depend on how the text was split into tokens: the one that ends first, and of those the
longest. A reader of single characters would find the same.
"""

from nanohybrid.text import TextStream, Tokenizer


class StopStrings:
    """Text goes in piece by piece; text that is certainly not part of a stop string comes out."""

    __slots__ = ("_held", "stopped", "stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text; returns what can be released. After a match `stopped` is true and no more is released."""
        if self.stopped or not self.stops:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [(begin + len(stop), begin) for stop in self.stops if (begin := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        end = len(text) - max(partial_match(text, stop) for stop in self.stops)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """The text has ended: what was held back is released."""
        held, self._held = self._held, ""
        return held


def partial_match(text: str, stop: str) -> int:
    """The length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Detokenizer:
    """Turns the tokens of one request into text, token by token."""

    __slots__ = ("_characters", "_pieces", "_stops", "_taken")

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._characters = TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self._pieces: list[str] = []
        self._taken = 0

    def push(self, token: int) -> bool:
        """Add a token; returns whether its text completed a stop string."""
        piece = self._characters.push(token)
        if piece:
            self._add(self._stops.push(piece))
        return self._stops.stopped

    def take(self, end: bool) -> str:
        """The text released since the last call. end: no token follows."""
        if end:
            self._finish()
        text = "".join(self._pieces[self._taken :])
        self._taken = len(self._pieces)
        return text

    def whole(self) -> str:
        """The whole text, after the last token."""
        self._finish()
        return "".join(self._pieces)

    def _finish(self) -> None:
        if not self._stops.stopped:
            self._add(self._stops.push(self._characters.flush()))
            self._add(self._stops.flush())

    def _add(self, text: str) -> None:
        if text:
            self._pieces.append(text)
