"""The three things that a thinking budget may change, against the budget: accuracy, well-formed share, length of the answer.

The last two are the paper's way to see whether a model has learned to be cut off: one that has not goes on thinking in its answer, or
ends its trace a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanohybrid.engine import LLM
from nanohybrid.evaluate.recipe import EvaluateRecipe
from nanohybrid.evaluate.suites import Score, answer, score
from nanohybrid.tasks import Problem


@dataclass(frozen=True)
class BudgetPoint:
    """What a budget of so many thinking tokens gives."""

    budget: int
    score: Score


def budget_curve(
    llm: LLM,
    problems: Sequence[Problem],
    recipe: EvaluateRecipe,
    progress: Callable[[int], object] | None = None,
) -> list[BudgetPoint]:
    """The same problems under each budget of the recipe, in ascending order."""
    return [
        BudgetPoint(budget, score(answer(llm, problems, recipe.mode(True, budget), progress)))
        for budget in sorted(set(recipe.budgets))
    ]
