"""Right answers to held-out problems, model by model: what a report on a smaller model can be held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanohybrid.checkpoint import CheckpointReader
from nanohybrid.engine import LLM
from nanohybrid.errors import ConfigError
from nanohybrid.estimate.free_memory import check_room
from nanohybrid.evaluate import EvaluateRecipe, draw_problems
from nanohybrid.evaluate.stage import RUNNING, Done, accuracy
from nanohybrid.stages import Report, Stage, plots
from nanohybrid.text import Tokenizer

PRECISION = torch.float32  # of all models that answer, so that none is ahead by its rounding


def check_count(problems: int, tasks: Sequence[str]) -> None:
    """Raise ConfigError for a recipe that asks fewer than no problems, or of no family."""
    if problems < 0 or not tasks:
        raise ConfigError(
            f"problems is {problems} and tasks {list(tasks)}: give 0 or more, of at least one family"
        )


def check_problems(tasks: Sequence[str], model: Path, device: str) -> None:
    """Raise InputError, or MissingExtra, where a model cannot be asked: no tokenizer, a family that is unknown or not installed, no
    memory for it in the precision in which it answers."""
    Tokenizer.from_directory(model)
    draw_problems(tasks, 1)
    with CheckpointReader(model) as reader:
        check_room(reader.config, reader.held_bytes(PRECISION), device)


def right_answers(
    problems: int, tasks: Sequence[str], seed: int, models: Mapping[str, Path], stage: Stage, device: str
) -> dict[str, dict[str, Any]]:
    """By model: the share of right answers with its 95 % interval, and the like by family; each model's is logged as it is known.

    problems: of each family, thinking, greedy; 0 asks nothing.
    """
    if not problems:
        return {}
    asked, done = EvaluateRecipe(tuple(tasks), problems, seed=seed), Done(stage)
    drawn = draw_problems(asked.tasks, asked.problems, asked.seed)

    def answers(name: str) -> dict[str, Any]:
        llm = LLM(models[name], PRECISION, device, max_num_seqs=min(RUNNING, len(drawn)))
        found = accuracy(asked, llm, drawn, thinking=True, label=f"{name} answers")
        return {key: value for key, value in found.items() if key not in ("examples", "difficulties")}

    return {name: done(f"{name}.thinking", partial(answers, name)) for name in models}


def show_answers(report: Report, found: Mapping[str, Mapping[str, Any]]) -> None:
    """What was asked, and a picture by family."""
    problems = next(iter(found.values()))["problems"]
    report.text(
        f"Right answers to {problems:,} problems that no model was trained on, thinking, greedy; in brackets Wilson's 95 % interval. "
        "`nanohybrid evaluate` asks more of them, in more ways."
    )
    families = sorted({family for each in found.values() for family in each["families"]})
    bars = {
        name: [each["families"][family]["accuracy"] for family in families] for name, each in found.items()
    }
    report.figure(plots.bars(families, bars, "accuracy"), "Right answers by family.")


def share(found: Mapping[str, Any]) -> str:
    """A share of right answers with its interval."""
    return f"{found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
