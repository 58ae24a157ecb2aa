"""Accuracy, share of well-formed answers and answer length against the thinking budget.

The last two show whether a model has learned to answer after a truncated trace (paper, section 3.4). A model
that has not continues to think in its answer, or ends its trace a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanohybrid.engine import LLM
from nanohybrid.evaluate.recipe import EvaluateRecipe
from nanohybrid.evaluate.suites import Score, aggregate, answer_problems
from nanohybrid.tasks import Problem


@dataclass(frozen=True)
class BudgetPoint:
    """The score at a thinking budget, in tokens."""

    budget: int
    score: Score


def budget_curve(
    llm: LLM,
    problems: Sequence[Problem],
    recipe: EvaluateRecipe,
    progress: Callable[[int], object] | None = None,
) -> list[BudgetPoint]:
    """The scores on the same problems under each budget of the recipe, in ascending order."""
    return [
        BudgetPoint(
            budget, aggregate(answer_problems(llm, problems, recipe.generation(True, budget), progress))
        )
        for budget in sorted(set(recipe.thinking_budgets))
    ]
