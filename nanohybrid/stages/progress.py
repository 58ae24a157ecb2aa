"""Progress of long jobs on stderr: a live line on a terminal, else a plain line every 10 seconds."""

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

PLAIN_SECONDS = 10.0


class Progress:
    """Counts work, prints rate and remaining time: `with progress("pretrain", total, unit="tok") as bar`."""

    def __init__(self, name: str, total: float | None, unit: str, done: float, stream: TextIO) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.first = done, done
        self.values: dict[str, Any] = {}
        self.began = self.printed = time.monotonic()
        self.stream = stream
        self.live: RichProgress | None = None

    def advance(self, amount: float = 1, **values: Any) -> None:
        """Add `amount` of work; `values` (a loss, an accuracy) are shown beside the count."""
        self.done += amount
        self.values.update(values)
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=self.done, status=self.status())
        elif time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.print_line()

    def status(self) -> str:
        """Count, rate, remaining time and values, on one line."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.first) / elapsed
        parts = [
            f"{format_count(self.done)}{f'/{format_count(self.total)}' if self.total else ''} "
            f"{self.unit}".rstrip()
        ]
        if rate > 0:
            parts.append(f"{format_count(rate)} {self.unit}/s".replace(" /s", "/s"))
        if self.total and self.done >= self.total:
            parts.append(f"in {format_duration(elapsed)}")
        elif self.total and rate > 0:
            parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        parts += [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.values.items()
        ]
        return "  ".join(parts)

    def print_line(self) -> None:
        """Write one plain line."""
        self.printed = time.monotonic()
        share = f"{self.done / self.total:4.0%}  " if self.total else ""
        print(f"{self.name}  {share}{self.status()}", file=self.stream, flush=True)

    def __enter__(self) -> Self:
        if self.stream.isatty():
            columns: list[str | ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                StatusColumn(),
            ]
            self.live = RichProgress(*columns, console=Console(file=self.stream), refresh_per_second=4)
            self.live.add_task(self.name, total=self.total, completed=int(self.done), status="")
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        elif time.monotonic() - self.began >= 1:
            self.print_line()


class StatusColumn(ProgressColumn):
    """The status text of a task, truncated on a narrow terminal."""

    def render(self, task: RichTask) -> Text:
        return Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


def progress(
    name: str, total: float | None = None, unit: str = "", done: float = 0, stream: TextIO | None = None
) -> Progress:
    """The progress of a job.

    `done` is the work of an earlier, interrupted run, which does not count for the rate.
    """
    return Progress(name, total, unit, done, stream or sys.stderr)


def format_count(number: float) -> str:
    """A number with at most five characters: 950, 12.3k, 4.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
