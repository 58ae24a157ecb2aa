"""Accuracy on held-out problems in the reports of compression and quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.engine import LLM
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.free_memory import check_memory
from nanohybrid.evaluate import EvaluateRecipe, draw_problems
from nanohybrid.evaluate.stage import MAX_NUM_SEQS, ResultCache, accuracy
from nanohybrid.stages import Report, Stage, plots
from nanohybrid.text import Tokenizer

PRECISION = torch.float32  # of all compared models, so that rounding favors none


def check_problem_settings(problems: int, tasks: Sequence[str]) -> None:
    """Raise ConfigError for a negative number of problems, or no family of tasks."""
    if problems < 0 or not tasks:
        raise ConfigError(
            f"problems is {problems} and tasks {list(tasks)}: give 0 or more problems of at least one family"
        )


def check_can_answer(tasks: Sequence[str], model: Path, device: str) -> None:
    """Raise InputError or MissingExtraError where the model cannot answer problems of `tasks`.

    Reasons: no tokenizer, a family that is unknown or not installed, or too little memory for the model in
    fp32.
    """
    Tokenizer.from_directory(model)
    draw_problems(tasks, 1)
    with CheckpointReader(model) as reader:
        check_memory(reader.config, reader.weight_bytes(PRECISION), device)


def measure_accuracy(
    problems: int, tasks: Sequence[str], seed: int, models: Mapping[str, Path], stage: Stage, device: str
) -> dict[str, dict[str, Any]]:
    """Scores of each model with thinking, greedy, in total and by family; empty for `problems=0`.

    problems: of each family. Each model's result is stored in the stage, so a resumed stage does not repeat
    it.
    """
    if not problems:
        return {}
    recipe, cache = EvaluateRecipe(tuple(tasks), problems, seed=seed), ResultCache(stage)
    drawn = draw_problems(recipe.tasks, recipe.problems, recipe.seed)

    def scores(name: str) -> dict[str, Any]:
        llm = LLM(models[name], PRECISION, device, max_num_seqs=min(MAX_NUM_SEQS, len(drawn)))
        found = accuracy(recipe, llm, drawn, thinking=True, label=f"{name} answers")
        return {key: value for key, value in found.items() if key not in ("examples", "difficulties")}

    return {name: cache(f"{name}.thinking", partial(scores, name)) for name in models}


def add_accuracy(report: Report, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a paragraph on the problems and a figure of the accuracy by family to a report."""
    problems = next(iter(found.values()))["problems"]
    report.text(
        f"Accuracy on {problems:,} held-out problems, with thinking, greedy decoding; in brackets Wilson's "
        "95 % interval. "
        "`nanohybrid evaluate` measures more."
    )
    families = sorted({family for each in found.values() for family in each["families"]})
    bars = {
        name: [each["families"][family]["accuracy"] for family in families] for name, each in found.items()
    }
    report.figure(plots.bars(families, bars, "accuracy"), "Accuracy by family.")


def format_accuracy(found: Mapping[str, Any]) -> str:
    """An accuracy with its interval, as `51.0% (45.2% to 56.8%)`."""
    return f"{found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
