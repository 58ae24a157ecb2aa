"""How long the step in progress has been running: asked from another thread, which a step that hangs cannot answer itself."""

import time


class Watchdog:
    """`limit` is how many seconds a step may take; `slow` counts those that took longer, `slowest` is the longest of all."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.slow, self.slowest = 0, 0.0
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = self.seconds
        self._began = None
        self.slow += seconds > self.limit
        self.slowest = max(self.slowest, seconds)

    @property
    def seconds(self) -> float:
        """Of the step in progress; 0 between steps."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def stalled(self) -> bool:
        """Whether the step in progress has exceeded the limit."""
        return self.seconds > self.limit
