"""Accuracy on held-out problems: the engine answers problems of the test splits, and the verifiers of the
tasks score the answers.

A completion is well formed if the model stopped by itself and its trace ends exactly once: one `</think>`
with thinking on, none with thinking off (the prompt has it). Models that were never trained on truncated
traces fail these two first (paper, section 3.4), so they are reported beside the accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from nanohybrid import tasks
from nanohybrid.engine import LLM, Completion, SamplingParams
from nanohybrid.errors import InputError
from nanohybrid.evaluate.intervals import wilson
from nanohybrid.evaluate.recipe import GenerationConfig
from nanohybrid.tasks import Problem
from nanohybrid.text import THINK_CLOSE

DRAWS_EACH = 20  # tries to draw a new problem before the family counts as exhausted


@dataclass(frozen=True)
class Answer:
    """A model's answer to a problem, scored.

    correct is the score of the verifier, from 0 to 1. Lengths are in tokens; inserted tokens and EOS do not
    count.
    """

    problem: Problem
    text: str
    correct: float
    well_formed: bool
    thinking_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Score:
    """Accuracy with its 95 % interval (low, high), share of well-formed answers, mean lengths in tokens."""

    problems: int
    accuracy: float
    low: float
    high: float
    well_formed: float
    thinking_tokens: float
    answer_tokens: float

    def as_dict(self) -> dict[str, Any]:
        """The fields, floats rounded to 4 digits."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def draw_problems(names: Sequence[str], each: int, seed: int = 0) -> list[Problem]:
    """`each` different problems of every family from its test split, difficulties in turn; fewer where a
    family has fewer.

    The same seed gives the same problems. Raises InputError for no family, an unknown one, or `each` below 1.
    """
    if each < 1 or not names:
        raise InputError("an evaluation needs at least one family of tasks and one problem of it")
    problems = []
    for name in names:
        task, rng, seen = tasks.get(name), random.Random(f"evaluate {name} {seed}"), set()
        for number in range(each):
            difficulty = task.difficulties[number % len(task.difficulties)]
            for _ in range(DRAWS_EACH):
                problem = task.make(rng, difficulty, "test")
                if problem.prompt not in seen:
                    seen.add(problem.prompt)
                    problems.append(problem)
                    break
    return problems


def answer_problems(
    llm: LLM,
    problems: Sequence[Problem],
    config: GenerationConfig,
    progress: Callable[[int], object] | None = None,
) -> list[Answer]:
    """The model's answers to all problems, generated in one batch with one seed per problem.

    progress: called with the number of newly finished problems.
    """
    prompts = [
        llm.encode_chat([{"role": "user", "content": problem.prompt}], config.thinking)
        for problem in problems
    ]
    params = [
        SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed + number,
            thinking_budget=config.thinking_budget if config.thinking else None,
            thinking_grace=config.thinking_grace,
            may_think=llm.may_think(prompt),
        )
        for number, prompt in enumerate(prompts)
    ]
    return [
        score_completion(problem, done, config.thinking)
        for problem, done in zip(problems, llm.generate(prompts, params, progress), strict=True)
    ]


def score_completion(problem: Problem, completion: Completion, thinking: bool) -> Answer:
    """Score one completion with the verifier of its task, and check whether it is well formed.

    A completion that was cut off, or whose trace never ended, has no answer and scores 0.
    """
    text = completion.text
    stopped, closings = completion.finish_reason == "stop", text.count(THINK_CLOSE)
    unfinished = thinking and closings == 0  # the trace never ended, so there is no answer
    correct = 0.0 if unfinished or not stopped else tasks.get(problem.family).verify(problem, text)
    return Answer(
        problem=problem,
        text=text,
        correct=correct,
        well_formed=stopped and closings == (1 if thinking else 0),
        thinking_tokens=completion.thinking_tokens,
        answer_tokens=max(
            0, len(completion.token_ids) - completion.thinking_tokens - len(completion.forced) - stopped
        ),
    )


def aggregate(answers: Sequence[Answer]) -> Score:
    """The score over all answers, of which there must be at least one."""
    total, right = len(answers), sum(item.correct for item in answers)
    low, high = wilson(right, total)
    return Score(
        total,
        right / total,
        low,
        high,
        well_formed=fmean(item.well_formed for item in answers),
        thinking_tokens=fmean(item.thinking_tokens for item in answers),
        answer_tokens=fmean(item.answer_tokens for item in answers),
    )


def by_family(answers: Iterable[Answer]) -> dict[str, Score]:
    """The score of each family."""
    return _grouped(answers, lambda item: item.problem.family)


def by_difficulty(answers: Iterable[Answer]) -> dict[str, Score]:
    """The score of each family and difficulty, under names like `sums-3`."""
    return _grouped(answers, lambda item: f"{item.problem.family}-{item.problem.difficulty}")


def _grouped(answers: Iterable[Answer], key: Callable[[Answer], str]) -> dict[str, Score]:
    groups: dict[str, list[Answer]] = {}
    for item in answers:
        groups.setdefault(key(item), []).append(item)
    return {name: aggregate(groups[name]) for name in sorted(groups)}
