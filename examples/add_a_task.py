"""Add a task in one file: problems with worked traces, which are training data, reward and evaluation in one
object.

    python examples/add_a_task.py       # draws problems, verifies answers, and scores a model on them

After `register`, its name works wherever a recipe or a flag lists tasks.
"""

import random

import torch

import nanohybrid
from nanohybrid import LLM
from nanohybrid.evaluate import aggregate, answer_problems, draw_problems
from nanohybrid.evaluate.recipe import GenerationConfig
from nanohybrid.tasks.problem import Family
from nanohybrid.tasks.registry import register


class Reversal(Family):
    """Reverse a word, one letter a step: `reverse abc` is solved as `c`, `cb`, `cba`."""

    name = "reversal"
    difficulties = range(2, 9)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[str, list[str], str]:
        """A prompt, the steps of its worked trace and its answer."""
        word = "".join(rng.choice("abcdefgh") for _ in range(difficulty))
        steps = [word[::-1][: n + 1] for n in range(difficulty)]
        return f"reverse {word}", steps, word[::-1]


def main() -> None:
    task = Reversal()
    register(task)

    rng = random.Random(0)
    problem = task.make(rng, difficulty=4)
    print(problem.prompt, "->", problem.trace.replace("\n", ", "), "->", problem.answer)
    assert task.verify(problem, f"<think>{problem.trace}</think>{problem.answer}") == 1.0
    assert task.verify(problem, "<think></think>zzzz") == 0.0
    assert task.make(rng, 4, split="test").prompt != problem.prompt  # splits share no prompt

    llm = LLM.random(nanohybrid.preset("tiny"), torch.float32)
    problems = draw_problems([task.name], 4)
    result = aggregate(answer_problems(llm, problems, GenerationConfig(max_tokens=24)))
    print(
        f"random weights solve {result.accuracy:.0%} of {result.problems} ({result.low:.0%} to "
        f"{result.high:.0%})"
    )


if __name__ == "__main__":
    main()
