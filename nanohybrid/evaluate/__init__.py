"""Evaluation: accuracy with thinking on, off and within a budget; held-out loss; decode time and memory against context."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanohybrid.evaluate.perplexity import held_out_loss
    from nanohybrid.evaluate.recipe import EvaluateRecipe
    from nanohybrid.evaluate.stage import evaluate
    from nanohybrid.evaluate.suites import answer, draw_problems, score
    from nanohybrid.evaluate.throughput import decode_times

_HOME = {
    "EvaluateRecipe": "recipe", "answer": "suites", "decode_times": "throughput", "draw_problems": "suites", "evaluate": "stage",
    "held_out_loss": "perplexity", "score": "suites",
}  # fmt: skip
__all__ = ["EvaluateRecipe", "answer", "decode_times", "draw_problems", "evaluate", "held_out_loss", "score"]


def __getattr__(name: str) -> Any:  # lazily: the recipe needs no torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
