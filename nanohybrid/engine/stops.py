"""Stop strings in a stream: nothing that could be the beginning of one is let out, and the text is cut before the first.

Which stop string wins must not depend on how the text was split into tokens: the one whose end comes first, and of those
the longest. That is what a reader of single characters would find.
"""


class StopStrings:
    """Text goes in by pieces; text that is certain to belong to the answer comes out."""

    __slots__ = ("_held", "stopped", "stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Add a piece; returns what may be shown now. After a match `stopped` is true and nothing more comes out."""
        if self.stopped or not self.stops:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [(begin + len(stop), begin) for stop in self.stops if (begin := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = len(text) - max(begun(text, stop) for stop in self.stops)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The end of the text: what was held back after all belongs to it."""
        held, self._held = self._held, ""
        return held


def begun(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` in which the text ends."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
