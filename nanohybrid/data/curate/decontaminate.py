"""Keeps what evaluation asks out of what training reads.

A document is contaminated if it shares a run of thirteen words with an evaluation prompt, or has the whole of a shorter one as a
line. Prompts of our own tasks need no list: a hash says which split each belongs to, so every one of them is known.
"""

import re
from collections.abc import Iterable

from nanohybrid import tasks

GRAM = 13
WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]")


class Decontaminator:
    """Knows a set of evaluation prompts, and the test split of our tasks."""

    def __init__(self, prompts: Iterable[str] = ()) -> None:
        self.grams: set[tuple[str, ...]] = set()
        self.lines: set[str] = set()
        for prompt in prompts:
            words = _words(prompt)
            if len(words) >= GRAM:
                self.grams.update(_grams(words))
            else:
                self.lines.add(" ".join(words))
        self.lines.discard("")

    def catches(self, text: str) -> bool:
        """Whether a text holds what is to be evaluated on."""
        if self.lines and any(" ".join(_words(line)) in self.lines for line in text.splitlines()):
            return True
        return bool(self.grams) and any(gram in self.grams for gram in _grams(_words(text)))

    @staticmethod
    def catches_prompt(prompt: str) -> bool:
        """Whether a problem belongs to the test split of its task."""
        return tasks.split_of(prompt) == "test"


def _words(text: str) -> list[str]:
    """Words, single digits and signs, lower case: what two writings of one problem share."""
    return WORD.findall(text.lower())


def _grams(words: list[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(words[shift:] for shift in range(GRAM)), strict=False)
