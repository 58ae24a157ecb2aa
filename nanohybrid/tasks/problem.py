"""What a task is: it makes problems with worked traces, and verifies answers.

The same object is training data (prompt, trace, answer), reward (`verify`) and evaluation (the test split), so that the three
cannot drift apart.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol, runtime_checkable

from nanohybrid.errors import InputError

Split = Literal["train", "test"]

# One prompt in eight is for evaluation. Fewer would leave the smallest family (four bits of parity, sixteen prompts) without any.
TEST_ONE_IN = 8
MAX_DRAWS = 10_000
THINK_CLOSE = "</think>"


@dataclass(frozen=True)
class Problem:
    """A question with its worked trace (one local equation a line) and its answer.

    `extra` is what a foreign verifier needs beside the answer; our own families leave it empty.
    """

    family: str
    difficulty: int
    prompt: str
    trace: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@runtime_checkable
class Task(Protocol):
    """A family of verifiable problems."""

    name: str
    difficulties: range

    def make(self, rng: random.Random, difficulty: int, split: Split = "train") -> Problem:
        """A problem drawn from `rng` alone; never one of the other split."""
        ...

    def verify(self, problem: Problem, completion: str) -> float:
        """0 to 1: how right the answer of `completion` is (what stands after its last `</think>`)."""
        ...


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, for ever and on every machine: a hash of the prompt decides, so that no list is kept."""
    digest = blake2b(prompt.encode(), digest_size=8, person=b"nanohybrid/split").digest()
    return "test" if int.from_bytes(digest, "big") % TEST_ONE_IN == 0 else "train"


def final_answer(completion: str) -> str:
    """What is judged of a completion: the text after its last `</think>`, stripped."""
    return completion.rpartition(THINK_CLOSE)[2].strip()


class Family(ABC):
    """A task of ours: subclasses draw a problem and solve it step by step; splits and verification are the same for all."""

    name: str
    difficulties: range

    @abstractmethod
    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        """A prompt, the steps of its worked trace and its answer."""

    def make(self, rng: random.Random, difficulty: int, split: Split = "train") -> Problem:
        if difficulty not in self.difficulties:
            first, last = self.difficulties[0], self.difficulties[-1]
            raise InputError(f"task {self.name} has difficulties {first} to {last}, not {difficulty}")
        for _ in range(MAX_DRAWS):
            prompt, steps, answer = self.draw(rng, difficulty)
            if split_of(prompt) == split:
                return Problem(self.name, difficulty, prompt, "\n".join(steps), answer)
        raise InputError(
            f"task {self.name} has no problem of difficulty {difficulty} in the {split} split; take another difficulty"
        )

    def verify(self, problem: Problem, completion: str) -> float:
        return float(final_answer(completion) == problem.answer)
