"""Decontamination: documents with evaluation prompts are dropped from the training data.

A document is contaminated if it shares 13 consecutive words with an evaluation prompt (Brown et al. 2020,
appendix C), or has a shorter prompt as a line. Prompts of the built-in tasks need no list: a hash of the
prompt decides its split.
"""

import re
from collections.abc import Iterable

from nanohybrid import tasks

GRAM = 13
WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]")


class Decontaminator:
    """Finds evaluation prompts in documents, and problems of the test split."""

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

    def is_contaminated(self, text: str) -> bool:
        """Whether a text contains an evaluation prompt."""
        if self.lines and any(" ".join(_words(line)) in self.lines for line in text.splitlines()):
            return True
        return bool(self.grams) and any(gram in self.grams for gram in _grams(_words(text)))

    @staticmethod
    def is_test_problem(prompt: str) -> bool:
        """Whether a problem with this prompt belongs to the test split of its task."""
        return tasks.split_of(prompt) == "test"


def _words(text: str) -> list[str]:
    """Lower-case words, single digits and signs, so that formatting does not matter."""
    return WORD.findall(text.lower())


def _grams(words: list[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(words[shift:] for shift in range(GRAM)), strict=False)
