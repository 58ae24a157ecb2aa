"""Accuracy on held-out problems: the test split of the task families, answered by the engine, judged by their own verifiers.

A completion is well formed if the model stopped by itself and its trace ends exactly once: one `</think>` where thinking was
on, none where it was off (there the prompt has closed it). These two fail first where a model was never trained on truncated
traces (paper, section 3.4), so they stand beside accuracy.
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
from nanohybrid.evaluate.recipe import Mode
from nanohybrid.tasks import Problem
from nanohybrid.text import THINK_CLOSE

DRAWS_EACH = 20  # how often a problem is drawn anew before a family counts as exhausted


@dataclass(frozen=True)
class Answer:
    """What a model made of a problem."""

    problem: Problem
    text: str
    correct: float
    well_formed: bool
    thinking_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Score:
    """A share of right answers with its 95 % interval, the share of well-formed ones, and mean lengths in tokens."""

    problems: int
    accuracy: float
    low: float
    high: float
    well_formed: float
    thinking_tokens: float
    answer_tokens: float

    def as_dict(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def draw_problems(names: Sequence[str], each: int, seed: int = 0) -> list[Problem]:
    """`each` different problems of every family, their difficulties in turn, from the test split.

    A family that has fewer different ones gives what it has. The same seed gives the same problems.
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


def answer(
    llm: LLM, problems: Sequence[Problem], mode: Mode, progress: Callable[[int], object] | None = None
) -> list[Answer]:
    """Have a model answer all problems in one batch. Sampling is seeded, one seed a problem."""
    prompts = [
        llm.encode_chat([{"role": "user", "content": problem.prompt}], mode.thinking) for problem in problems
    ]
    params = [
        SamplingParams(
            max_tokens=mode.max_tokens,
            temperature=mode.temperature,
            top_p=mode.top_p,
            seed=mode.seed + number,
            thinking_budget=mode.budget if mode.thinking else None,
            thinking_grace=mode.grace,
        )
        for number in range(len(problems))
    ]
    return [
        judge(problem, done, mode.thinking)
        for problem, done in zip(problems, llm.generate(prompts, params, progress), strict=True)
    ]


def judge(problem: Problem, completion: Completion, thinking: bool) -> Answer:
    """Verify one completion and see whether it is well formed."""
    text = completion.text
    stopped, closings = completion.finish_reason == "stop", text.count(THINK_CLOSE)
    unfinished = thinking and closings == 0  # the trace never ended: what stands there is no answer
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


def score(answers: Sequence[Answer]) -> Score:
    """The answers in sum."""
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
    """The answers in sum, for each family."""
    return _grouped(answers, lambda item: item.problem.family)


def by_difficulty(answers: Iterable[Answer]) -> dict[str, Score]:
    """The answers in sum, for each family and difficulty, as `sums-3`."""
    return _grouped(answers, lambda item: f"{item.problem.family}-{item.problem.difficulty}")


def _grouped(answers: Iterable[Answer], key: Callable[[Answer], str]) -> dict[str, Score]:
    groups: dict[str, list[Answer]] = {}
    for item in answers:
        groups.setdefault(key(item), []).append(item)
    return {name: score(groups[name]) for name in sorted(groups)}
