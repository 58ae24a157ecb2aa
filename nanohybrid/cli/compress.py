"""`nanohybrid compress`: a model and a budget in, a smaller model out."""

import dataclasses
import json
from pathlib import Path

import jsonargparse

from nanohybrid.cli.common import print_json, recipe_from, recipe_parser, table
from nanohybrid.cli.distill import add_documents
from nanohybrid.errors import InputError

SUMMARY = "a model -> a smaller one in a given memory (prune, then distill)"


def parser() -> jsonargparse.ArgumentParser:
    """Flags of the command: the model, the budget, the documents, and those of CompressRecipe."""
    from nanohybrid.compress.stage import CompressRecipe

    result = recipe_parser("compress", SUMMARY, CompressRecipe)
    result.add_argument("path", type=Path, metavar="PATH", help="a checkpoint directory")
    result.add_argument("--budget-gib", type=float | None, metavar="G", help="budget_bytes in GiB")
    add_documents(result)
    return result


def run(arguments: jsonargparse.Namespace) -> None:
    """Compress, and tell both shapes and their losses."""
    from nanohybrid.compress.search import SHAPE
    from nanohybrid.compress.stage import CompressRecipe, compress
    from nanohybrid.stages.output import read_record

    recipe = recipe_from(CompressRecipe, arguments)
    if arguments.budget_gib is not None:
        if recipe.budget_bytes is not None:
            raise InputError("--budget-gib and budget_bytes contradict each other: give one of the two")
        if not 0 < arguments.budget_gib < 2**30:
            raise InputError(f"--budget-gib is {arguments.budget_gib}; it must be positive, and a memory that exists")
        recipe = dataclasses.replace(recipe, budget_bytes=int(arguments.budget_gib * 2**30))
    out = compress(recipe, arguments.path, arguments.data, arguments.out, arguments.pretraining)
    found = json.loads((out / "search" / "search.json").read_text())
    measures, chosen = read_record(out)["measures"], found["candidates"][0]
    if arguments.json:
        print_json({"out": out, "chosen": chosen, "budget_bytes": found["budget_bytes"], **measures})
        return
    rows = [[name, chosen["config"][name]] for name in SHAPE]
    rows += [["parameters", chosen["parameters"]], ["bytes at work", chosen["bytes"]["total"]]]
    rows += [[f"loss, {name}", measures["losses"][name]] for name in ("parent", "pruned", "distilled")]
    table(["", "result"], rows, title=f"{out}, for {found['budget']}")
