"""The stage `evaluate`: models in, `summary.json` and a report with figures out.

Each result of each model is stored when it is done, so a resumed evaluation repeats none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanohybrid.checkpoint import load, resolve
from nanohybrid.data import TokenStore
from nanohybrid.engine import LLM
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.evaluate.budget_curve import budget_curve
from nanohybrid.evaluate.perplexity import held_out_loss
from nanohybrid.evaluate.recipe import EvaluateRecipe
from nanohybrid.evaluate.report import evaluation_report
from nanohybrid.evaluate.suites import aggregate, answer_problems, by_difficulty, by_family, draw_problems
from nanohybrid.evaluate.throughput import decode_times
from nanohybrid.extras import require
from nanohybrid.files import atomic_write
from nanohybrid.stages import Stage, open_stage, progress
from nanohybrid.tasks import Problem

SUMMARY = "summary.json"
MAX_NUM_SEQS = 256  # on a CPU a step of a small model takes hardly longer for many sequences than for few


def evaluate(
    recipe: EvaluateRecipe,
    models: Mapping[str, Path],
    out: Path,
    data: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Evaluate the checkpoints `models` (by name) on a device; `data` is a directory with held-out stores
    (`validation*`).

    Returns `out`, which has summary.json and report.html. Raises InputError for no model or a name in the
    recipe that is none of `models`, and MissingExtraError without matplotlib.
    """
    require("matplotlib", "eval")  # checked here, because the report is only made at the end
    if not models:
        raise InputError("no model to evaluate: give at least one checkpoint directory")
    for name in (*recipe.curve_models, *recipe.decode_models):
        if name not in models:
            raise InputError(f"the recipe names the model {name}, which is not among {', '.join(models)}")
    models = {name: resolve(path) for name, path in models.items()}
    inputs = {f"model.{name}": path for name, path in models.items()} | ({"data": data} if data else {})
    with open_stage(out, "evaluate", recipe, inputs, recipe.seed, device) as stage:
        if stage.complete:
            return out
        cache = ResultCache(stage)
        problems = draw_problems(recipe.tasks, recipe.problems, recipe.seed)
        curves = recipe.curve_models or tuple(models)[:1]
        for name, path in models.items():
            evaluate_model(recipe, name, path, problems, data, name in curves, cache, device)
        if recipe.contexts:
            cache("decode", lambda: time_decoding(recipe, models, device))
        summary = summarize(recipe, list(models), cache.results)
        atomic_write(stage.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
        stage.measure(accuracy=summary["accuracy"])
        evaluation_report(recipe, summary).write(stage.directory / "report.html")
    return out


class ResultCache:
    """Results by name.

    Each is computed once and stored in the stage's directory, so a killed run loses at most one.
    """

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
    cache: ResultCache,
    device: str,
) -> None:
    """Accuracy, budget curve and held-out losses of one model; everything except the timing."""
    llm = LLM(path, torch.float32, device, max_num_seqs=MAX_NUM_SEQS)
    footprint = Footprint.of(llm.model.config)
    cache(
        f"{name}.shape",
        lambda: {
            "parameters": footprint.parameters,
            "pattern": llm.model.config.pattern,
            **asdict(footprint),
        },
    )
    for mode, thinking in (("thinking", True), ("no_thinking", False)):
        cache(f"{name}.{mode}", partial(accuracy, recipe, llm, problems, thinking, f"{name} {mode}"))
    if curve and recipe.thinking_budgets:
        cache(f"{name}.curve", lambda: curve_points(recipe, llm, problems, name))
    for store in held_out(data):
        cache(f"{name}.loss.{store.stem}", partial(loss_on, llm, store, recipe.held_out_tokens))


def accuracy(
    recipe: EvaluateRecipe, llm: LLM, problems: list[Problem], thinking: bool, label: str
) -> dict[str, Any]:
    """The score over all problems, by family and by difficulty, and one example answer of each family."""
    with progress(label, len(problems), "problems") as bar:
        answers = answer_problems(llm, problems, recipe.generation(thinking), bar.advance)
    return {
        **aggregate(answers).as_dict(),
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
    """The scores at each thinking budget."""
    with progress(f"{name} budgets", len(problems) * len(set(recipe.thinking_budgets)), "problems") as bar:
        return [
            {"budget": point.budget, **point.score.as_dict()}
            for point in budget_curve(llm, problems, recipe, bar.advance)
        ]


def loss_on(llm: LLM, store: Path, tokens: int) -> dict[str, Any]:
    """Loss, perplexity and number of targets on one store."""
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
    """Decode times of the models of the recipe, one row per context."""
    loaded = {
        name: load(models[name], torch.float32, device) for name in recipe.decode_models or tuple(models)
    }
    with progress("decode", len(recipe.contexts), "contexts") as bar:
        times = decode_times(
            loaded, recipe.contexts, recipe.decode_batch, recipe.decode_rounds, recipe.seed, bar.advance
        )
    return {name: [asdict(row) for row in rows] for name, rows in times.items()}


def summarize(recipe: EvaluateRecipe, models: list[str], results: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of summary.json: short tables first, all results under `models`."""
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
                key.removeprefix(f"{name}."): value
                for key, value in results.items()
                if key.startswith(f"{name}.")
            }
            for name in models
        },
    }
