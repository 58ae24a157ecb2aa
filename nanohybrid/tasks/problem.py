"""The interface of a task: it generates problems with reasoning traces, and scores answers.

One object provides the training data (prompt, trace, answer), the reward (`verify`) and the evaluation (the
test split), so the three always agree.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol, runtime_checkable

from nanohybrid.errors import InputError

Split = Literal["train", "test"]

# One prompt in eight is in the test split. With fewer, the smallest family (parity of 4 bits, 16 prompts)
# might have none.
TEST_ONE_IN = 8
MAX_DRAWS = 10_000
THINK_CLOSE = "</think>"


@dataclass(frozen=True)
class Problem:
    """A question with its reasoning trace (one equation per line) and its answer.

    `extra` holds what the verifier of reasoning-gym needs; it is empty for the built-in families.
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
        """A random problem of the split; it depends on `rng` alone.

        Raises InputError for an unknown difficulty.
        """
        ...

    def verify(self, problem: Problem, completion: str) -> float:
        """The score, from 0 to 1, of the answer of `completion`: the text after its last `</think>`."""
        ...


def split_of(prompt: str) -> Split:
    """The split of a prompt.

    A hash of the prompt decides, so it is the same on every machine and needs no list.
    """
    digest = blake2b(prompt.encode(), digest_size=8, person=b"nanohybrid/split").digest()
    return "test" if int.from_bytes(digest, "big") % TEST_ONE_IN == 0 else "train"


def final_answer(completion: str) -> str:
    """The text of a completion after its last `</think>`, stripped."""
    return completion.rpartition(THINK_CLOSE)[2].strip()


class Family(ABC):
    """A built-in task.

    Subclasses draw a problem and solve it step by step; splits and verification are shared.
    """

    name: str
    difficulties: range

    @abstractmethod
    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        """A random prompt, the steps of its reasoning trace, and its answer."""

    def make(self, rng: random.Random, difficulty: int, split: Split = "train") -> Problem:
        if difficulty not in self.difficulties:
            first, last = self.difficulties[0], self.difficulties[-1]
            raise InputError(f"task {self.name} has difficulties {first} to {last}, not {difficulty}")
        for _ in range(MAX_DRAWS):
            prompt, steps, answer = self.draw(rng, difficulty)
            if split_of(prompt) == split:
                return Problem(self.name, difficulty, prompt, "\n".join(steps), answer)
        raise InputError(
            f"task {self.name} has no problem of difficulty {difficulty} in the {split} split; take another "
            "difficulty"
        )

    def verify(self, problem: Problem, completion: str) -> float:
        return float(final_answer(completion) == problem.answer)
