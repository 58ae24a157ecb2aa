"""`nanohybrid compress`: a model and a budget in, a smaller model out."""

import dataclasses
import json
from pathlib import Path

import jsonargparse

from nanohybrid.cli.common import print_json, recipe_from, recipe_parser, table
from nanohybrid.cli.distill import add_documents
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.errors import InputError

SUMMARY = "a model -> a smaller one in a given memory (prune, then distill)"


def parser() -> jsonargparse.ArgumentParser:
    """Flags of the command: the model, the budget, the documents, and those of CompressRecipe."""
    from nanohybrid.compress.recipe import CompressRecipe

    result = recipe_parser("compress", SUMMARY, CompressRecipe)
    result.add_argument("path", type=Path, metavar="PATH", help="a checkpoint directory")
    result.add_argument("--budget-gib", type=float | None, metavar="G", help="budget_bytes in GiB")
    result.add_argument(
        "--beside-gib",
        type=float | None,
        metavar="G",
        help="beside_bytes in GiB: what else must fit on --device",
    )
    add_documents(result, required=False)
    add_device_flag(result, "--run-on", "where all of it runs (--device is what the result is for)")
    return result


def run(arguments: jsonargparse.Namespace) -> None:
    """Compress, and tell both shapes and their losses."""
    from nanohybrid.compress.recipe import CompressRecipe
    from nanohybrid.compress.stage import compress
    from nanohybrid.stages.output import read_record

    if arguments.device is not None and arguments.device.startswith(("auto", "cuda")):
        raise InputError(
            f"--device {arguments.device}: that is where it runs, which is --run-on; --device is what the result is for, as a10g"
        )
    recipe = recipe_from(CompressRecipe, arguments)
    if arguments.budget_gib is not None:
        if recipe.budget_bytes is not None:
            raise InputError("--budget-gib and budget_bytes contradict each other: give one of the two")
        recipe = dataclasses.replace(recipe, budget_bytes=in_bytes("--budget-gib", arguments.budget_gib))
    if arguments.beside_gib is not None:
        if recipe.device is None:
            raise InputError(
                "--beside-gib is taken off a --device, and none is named: a budget in bytes is already what is left"
            )
        recipe = dataclasses.replace(recipe, beside_bytes=in_bytes("--beside-gib", arguments.beside_gib))
    run_on = usable_device(arguments.run_on, "--run-on")
    out = compress(recipe, arguments.path, arguments.data, arguments.out, arguments.pretraining, run_on)
    found = json.loads((out / "search" / "search.json").read_text())
    measures, chosen = read_record(out)["measures"], found["candidates"][0]
    if arguments.json:
        print_json({"out": out, "chosen": chosen, "budget_bytes": found["budget_bytes"], **measures})
        return
    rows = [[name, size] for name, size in chosen["config"].items() if name != "pattern"]
    rows += [["parameters", chosen["parameters"]], ["bytes at work", chosen["bytes"]["total"]]]
    rows += [[f"loss, {name}", loss] for name, loss in measures["losses"].items()]
    rows += [
        [f"right answers, {name}", f"{share['accuracy']:.1%}"] for name, share in measures["accuracy"].items()
    ]
    rows += [["for llama.cpp", out / measures["gguf"]["file"]]] if "gguf" in measures else []
    table(["", "result"], rows, title=f"{out}, for {found['budget']}")


def in_bytes(flag: str, gib: float) -> int:
    """GiB as bytes. Raises InputError for what is no memory."""
    if not 0 < gib < 2**30:
        raise InputError(f"{flag} is {gib}; it must be positive, and a memory that exists")
    return int(gib * 2**30)
