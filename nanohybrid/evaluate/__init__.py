"""Evaluation: accuracy with and without thinking and vs. thinking budget, held-out loss, decode time vs.
context length."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanohybrid.evaluate.perplexity import held_out_loss
    from nanohybrid.evaluate.recipe import EvaluateRecipe
    from nanohybrid.evaluate.stage import evaluate
    from nanohybrid.evaluate.suites import aggregate, answer_problems, draw_problems
    from nanohybrid.evaluate.throughput import decode_times

_HOME = {
    "EvaluateRecipe": "recipe", "aggregate": "suites", "answer_problems": "suites",
    "decode_times": "throughput", "draw_problems": "suites", "evaluate": "stage",
    "held_out_loss": "perplexity",
}  # fmt: skip
__all__ = [
    "EvaluateRecipe",
    "aggregate",
    "answer_problems",
    "decode_times",
    "draw_problems",
    "evaluate",
    "held_out_loss",
]


def __getattr__(name: str) -> Any:  # lazy, because the recipe does not need torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
