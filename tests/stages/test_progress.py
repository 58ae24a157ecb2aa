"""Progress goes to its stream, with rate and remaining time, and never to stdout."""

import io
import time

import pytest

from nanohybrid.stages import progress
from nanohybrid.stages import progress as progress_function
from nanohybrid.stages.progress import Progress, format_count, format_duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def ticking(monkeypatch):
    result = Clock()
    monkeypatch.setattr(time, "monotonic", result)
    return result


def test_progress_prints_a_plain_line_every_10_seconds_without_a_terminal(ticking):
    stream = io.StringIO()
    with progress("pretrain", 4000, unit="tok", stream=stream) as bar:
        for _ in range(40):
            ticking.now += 1
            bar.advance(100, loss=2.5)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pretrain   25%  1k/4k tok  100 tok/s  0:30 left  loss 2.5"
    assert len(lines) == 5 and lines[-1] == "pretrain  100%  4k/4k tok  100 tok/s  in 0:40  loss 2.5"


def test_progress_of_a_short_job_prints_nothing(ticking, capsys):
    with progress("load", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr() == ("", "")


def test_progress_rate_leaves_out_the_work_of_an_earlier_run(ticking):
    bar = progress_function("pretrain", 1000, unit="tok", done=900, stream=io.StringIO())
    ticking.now = 10
    bar.advance(50)
    assert bar.status() == "950/1k tok  5 tok/s  0:10 left"


def test_progress_without_a_total_shows_no_percentage_and_no_remaining_time(ticking):
    bar = progress_function("read", unit="docs", stream=io.StringIO())
    ticking.now = 2
    bar.advance(10)
    assert bar.status() == "10 docs  5 docs/s"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_a_live_line():
    stream = Terminal()
    with Progress("pretrain", 10, "tok", 0, stream) as bar:
        bar.advance(10, loss=1.0)
    assert "pretrain" in stream.getvalue() and "10/10 tok" in stream.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.9, "1k"), (12_345, "12.3k"), (999_900, "1M"), (4.5e6, "4.5M"), (2e9, "2G")],
)
def test_format_count_is_short(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_format_duration_is_m_ss(seconds, text):
    assert format_duration(seconds) == text
