"""The stage `evaluate`: models in, `summary.json` and a report with pictures out.

Each measurement of each model is kept as it is done, so that a resumed evaluation repeats none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanohybrid.checkpoint import load
from nanohybrid.data import TokenStore
from nanohybrid.engine import LLM
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.evaluate.budget_curve import budget_curve
from nanohybrid.evaluate.perplexity import held_out_loss
from nanohybrid.evaluate.recipe import EvaluateRecipe
from nanohybrid.evaluate.report import evaluation_report
from nanohybrid.evaluate.suites import answer, by_difficulty, by_family, draw_problems, score
from nanohybrid.evaluate.throughput import decode_times
from nanohybrid.extras import require
from nanohybrid.files import atomic_write
from nanohybrid.stages import Stage, open_stage, progress
from nanohybrid.tasks import Problem

SUMMARY = "summary.json"
RUNNING = 256  # sequences at once: on a CPU a small model's step costs hardly more for many than for few


def evaluate(
    recipe: EvaluateRecipe,
    models: Mapping[str, Path],
    out: Path,
    data: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Measure the checkpoints `models` (by name) by a recipe, on a device; `data` is a directory with held-out stores (`validation*`)."""
    require("matplotlib", "eval")  # for the report at the end: an hour of work should not be what finds out
    if not models:
        raise InputError("there is no model to evaluate: name at least one checkpoint directory")
    for name in (*recipe.curve_models, *recipe.decode_models):
        if name not in models:
            raise InputError(f"the recipe names the model {name}, which is not among {', '.join(models)}")
    inputs = {f"model.{name}": path for name, path in models.items()} | ({"data": data} if data else {})
    with open_stage(out, "evaluate", recipe, inputs, recipe.seed, device) as stage:
        if stage.complete:
            return out
        done = Done(stage)
        problems = draw_problems(recipe.tasks, recipe.problems, recipe.seed)
        curves = recipe.curve_models or tuple(models)[:1]
        for name, path in models.items():
            evaluate_model(recipe, name, path, problems, data, name in curves, done, device)
        if recipe.contexts:
            done("decode", lambda: time_decoding(recipe, models, device))
        summary = summarize(recipe, list(models), done.results)
        atomic_write(stage.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
        stage.measure(accuracy=summary["accuracy"])
        evaluation_report(recipe, summary).write(stage.directory / "report.html")
    return out


class Done:
    """Results by name, each computed once and kept in the stage's directory, so that a kill loses at most one."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.results: dict[str, Any] = {row["name"]: row["result"] for row in stage.series("results")}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.results:
            self.results[name] = compute()
            self.stage.log("results", name=name, result=self.results[name])
        return self.results[name]


def evaluate_model(
    recipe: EvaluateRecipe,
    name: str,
    path: Path,
    problems: list[Problem],
    data: Path | None,
    curve: bool,
    done: Done,
    device: str,
) -> None:
    """All that concerns one model but the timing."""
    llm = LLM(path, torch.float32, device, max_num_seqs=RUNNING)
    footprint = Footprint.of(llm.model.config)
    done(
        f"{name}.shape",
        lambda: {
            "parameters": footprint.parameters,
            "pattern": llm.model.config.pattern,
            **asdict(footprint),
        },
    )
    for mode, thinking in (("thinking", True), ("no_thinking", False)):
        done(f"{name}.{mode}", partial(accuracy, recipe, llm, problems, thinking, f"{name} {mode}"))
    if curve and recipe.budgets:
        done(f"{name}.curve", lambda: curve_points(recipe, llm, problems, name))
    for store in held_out(data):
        done(f"{name}.loss.{store.stem}", partial(loss_on, llm, store, recipe.held_out_tokens))


def accuracy(
    recipe: EvaluateRecipe, llm: LLM, problems: list[Problem], thinking: bool, label: str
) -> dict[str, Any]:
    """Scores over all problems, by family and by difficulty, and a few answers to look at."""
    with progress(label, len(problems), "problems") as bar:
        answers = answer(llm, problems, recipe.mode(thinking), bar.advance)
    return {
        **score(answers).as_dict(),
        "families": {key: value.as_dict() for key, value in by_family(answers).items()},
        "difficulties": {key: value.as_dict() for key, value in by_difficulty(answers).items()},
        "examples": [
            {"prompt": item.problem.prompt, "text": item.text, "correct": item.correct}
            for item in answers[:: recipe.problems]
        ],
    }


def curve_points(
    recipe: EvaluateRecipe, llm: LLM, problems: list[Problem], name: str
) -> list[dict[str, Any]]:
    """A row for each budget."""
    with progress(f"{name} budgets", len(problems) * len(set(recipe.budgets)), "problems") as bar:
        return [
            {"budget": point.budget, **point.score.as_dict()}
            for point in budget_curve(llm, problems, recipe, bar.advance)
        ]


def loss_on(llm: LLM, store: Path, tokens: int) -> dict[str, Any]:
    """Loss and perplexity on one store."""
    documents = TokenStore.read(store)
    documents.check_ids(llm.model.config.vocab_size, store)
    found = held_out_loss(llm.model, documents, tokens)
    return {"loss": found.loss, "perplexity": found.perplexity, "targets": found.targets}


def held_out(data: Path | None) -> list[Path]:
    """The held-out stores of a data directory."""
    return [] if data is None else sorted(data.glob("validation*.safetensors"))


def time_decoding(
    recipe: EvaluateRecipe, models: Mapping[str, Path], device: str
) -> dict[str, list[dict[str, Any]]]:
    """Decode times of the models that the recipe names."""
    loaded = {
        name: load(models[name], torch.float32, device) for name in recipe.decode_models or tuple(models)
    }
    with progress("decode", len(recipe.contexts), "contexts") as bar:
        times = decode_times(
            loaded, recipe.contexts, recipe.decode_batch, recipe.decode_rounds, recipe.seed, bar.advance
        )
    return {name: [asdict(row) for row in rows] for name, rows in times.items()}


def summarize(recipe: EvaluateRecipe, models: list[str], results: Mapping[str, Any]) -> dict[str, Any]:
    """The results as one object: short tables first, everything under `models`."""
    return {
        "accuracy": {
            name: {mode: results[f"{name}.{mode}"]["accuracy"] for mode in ("thinking", "no_thinking")}
            for name in models
        },
        "budget_curve": {
            name: [[point["budget"], point["accuracy"]] for point in results[f"{name}.curve"]]
            for name in models
            if f"{name}.curve" in results
        },
        "decode_ms": {
            name: [[row["context"], row["milliseconds"]] for row in rows]
            for name, rows in results.get("decode", {}).items()
        },
        "decode": results.get("decode", {}),
        "models": {
            name: {
                key.partition(".")[2]: value for key, value in results.items() if key.startswith(f"{name}.")
            }
            for name in models
        },
    }
