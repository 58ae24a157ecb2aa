"""`nanohybrid evaluate`: accuracy, budget curves, decode times and a report of one or more checkpoints."""

import json
from pathlib import Path
from typing import Any

import jsonargparse

from nanohybrid.cli.common import MODEL, print_json, recipe_from, recipe_parser, table
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.errors import InputError
from nanohybrid.evaluate.recipe import EvaluateRecipe

SUMMARY = "accuracy, accuracy vs. thinking budget, decode time"


def parser() -> jsonargparse.ArgumentParser:
    """The models, and the flags of EvaluateRecipe."""
    result = recipe_parser("evaluate", SUMMARY, EvaluateRecipe)
    result.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"each PATH or NAME=PATH; {MODEL}",
    )
    result.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a data directory; the loss on its held-out documents (validation*) is measured",
    )
    add_device_flag(result)
    return result


def run(arguments: jsonargparse.Namespace) -> None:
    """Evaluate, and print accuracies and decode times."""
    from nanohybrid.evaluate.stage import SUMMARY as FILE
    from nanohybrid.evaluate.stage import evaluate

    recipe, models, device = (
        recipe_from(EvaluateRecipe, arguments),
        named(arguments.models),
        usable_device(arguments.device),
    )
    out = evaluate(recipe, models, arguments.out, arguments.data, device)
    summary: dict[str, Any] = json.loads((out / FILE).read_text())
    if arguments.json:
        print_json({"out": out, **summary})
        return
    rows = [
        [name, found["shape"]["parameters"], *(interval(found[mode]) for mode in ("thinking", "no_thinking"))]
        for name, found in summary["models"].items()
    ]
    table(
        ["model", "parameters", "thinking", "no thinking"], rows, title=f"{out}: accuracy with 95 % intervals"
    )
    if summary["decode_ms"]:
        contexts = [context for context, _ in next(iter(summary["decode_ms"].values()))]
        times = [[name, *(ms for _, ms in found)] for name, found in summary["decode_ms"].items()]
        table(
            ["model", *(f"{context:,}" for context in contexts)],
            times,
            title="ms per decode step, by context length",
        )


def interval(score: dict[str, float]) -> str:
    """An accuracy with its interval."""
    return f"{score['accuracy']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def named(models: list[str]) -> dict[str, Path]:
    """Models by name, from `PATH` or `NAME=PATH`; without a name, the last directory of the path is the name.

    Raises InputError where two models have the same name.
    """
    result: dict[str, Path] = {}
    for model in models:
        name, given, path = model.partition("=")
        if not given:
            name, path = Path(model).resolve().name, model
        if name in result:
            raise InputError(f"two models have the name {name}: name them, as in first={path} second=...")
        result[name] = Path(path)
    return result
