"""The generators of reasoning-gym as tasks without traces (extra `rl`): `gym/leg_counting`,
`gym/basic_arithmetic`, ...

Prompts, answers and scores are those of reasoning-gym. The split of a prompt is decided by its hash, as for
every task. The difficulty is the global level of the generator's curriculum; a generator without a curriculum
has level 0 only.
"""

import random
from functools import cache
from typing import Any

from nanohybrid.errors import InputError
from nanohybrid.extras import require
from nanohybrid.tasks.problem import Problem, Split, final_answer, split_of

# Some generators take 0.1 s per problem, so the search for a problem of the wanted split stops early.
MAX_DRAWS = 200
SIZE = 10_000  # problems of a generator and level; some generators make all of them in advance


class Gym:
    """One generator of reasoning-gym.

    Raises InputError for an unknown name, MissingExtraError without reasoning-gym.
    """

    def __init__(self, generator: str) -> None:
        factory = require("reasoning_gym.factory", "rl")
        if generator not in factory.DATASETS:
            raise InputError(
                f"reasoning-gym has no generator {generator!r}; it has {', '.join(sorted(factory.DATASETS))}"
            )
        self.name = f"gym/{generator}"
        self.generator = generator
        self.difficulties = range(_levels(generator))

    def make(self, rng: random.Random, difficulty: int, split: Split = "train") -> Problem:
        """A problem of the split.

        Raises InputError for an unknown difficulty, or where no problem is found.
        """
        if difficulty not in self.difficulties:
            raise InputError(
                f"task {self.name} has difficulties 0 to {self.difficulties[-1]}, not {difficulty}"
            )
        dataset = _dataset(self.generator, difficulty)
        for _ in range(MAX_DRAWS):
            entry = dataset[rng.randrange(len(dataset))]
            prompt = str(entry["question"])
            if split_of(prompt) == split:
                answer = entry["answer"]
                return Problem(
                    self.name, difficulty, prompt, "", "" if answer is None else str(answer), extra=entry
                )
        raise InputError(
            f"task {self.name} has no problem of difficulty {difficulty} in the {split} split; take another "
            "difficulty"
        )

    def verify(self, problem: Problem, completion: str) -> float:
        """The score of reasoning-gym, from 0 to 1."""
        dataset = _dataset(self.generator, problem.difficulty)
        return float(dataset.score_answer(answer=final_answer(completion), entry=problem.extra))


def _levels(generator: str) -> int:
    factory = require("reasoning_gym.factory", "rl")
    if not factory.has_curriculum(generator):
        return 1
    attributes = factory.create_curriculum(generator).attributes
    return max((len(attribute.levels) for attribute in attributes.values()), default=1)


@cache
def _dataset(generator: str, difficulty: int) -> Any:
    factory = require("reasoning_gym.factory", "rl")
    cls, config_cls = factory.DATASETS[generator]
    try:
        if not factory.has_curriculum(generator):
            return cls(config_cls(seed=0, size=SIZE))
        curriculum = factory.create_curriculum(generator)
        curriculum.set_global_level(difficulty)
        return cls(curriculum.generate_configuration({"seed": 0, "size": SIZE}))
    except (AssertionError, ValueError) as error:  # raised by reasoning-gym for a bad configuration
        raise InputError(
            f"reasoning-gym cannot make {generator} of difficulty {difficulty} ({error}); take another one"
        ) from error
