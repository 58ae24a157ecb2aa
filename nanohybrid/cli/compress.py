"""`nanohybrid compress`: a model and a budget in, a smaller model out."""

import dataclasses
import json
from pathlib import Path

import jsonargparse

from nanohybrid.cli.common import MODEL, print_json, recipe_from, recipe_parser, table
from nanohybrid.cli.distill import add_documents
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.errors import InputError

SUMMARY = "a model -> a smaller one in a given memory (prune, then distill)"


def parser() -> jsonargparse.ArgumentParser:
    """Flags of the command: the model, the budget, the documents, and those of CompressRecipe."""
    from nanohybrid.compress.recipe import CompressRecipe

    result = recipe_parser("compress", SUMMARY, CompressRecipe)
    result.add_argument("path", type=Path, metavar="PATH", help=MODEL)
    result.add_argument("--budget-gib", type=float | None, metavar="G", help="budget_bytes in GiB")
    result.add_argument(
        "--reserved-gib",
        type=float | None,
        metavar="G",
        help="reserved_bytes in GiB: memory of --device that the model may not use",
    )
    result.renamed({"--beside-gib": "--reserved-gib"})
    add_documents(result, required=False)
    add_device_flag(result, "--run-on", "where everything is computed (--device is what the result is for)")
    return result


def run(arguments: jsonargparse.Namespace) -> None:
    """Compress, and print the selected shape and the loss after each step."""
    from nanohybrid.compress.recipe import CompressRecipe
    from nanohybrid.compress.stage import compress
    from nanohybrid.stages.output import read_record

    if arguments.device is not None and arguments.device.startswith(("auto", "cuda")):
        raise InputError(
            f"--device {arguments.device}: that is where it runs, which is --run-on; --device is "
            "what the result is for, as a10g"
        )
    recipe = recipe_from(CompressRecipe, arguments)
    if arguments.budget_gib is not None:
        if recipe.budget_bytes is not None:
            raise InputError("--budget-gib and budget_bytes contradict each other: give one of the two")
        recipe = dataclasses.replace(recipe, budget_bytes=in_bytes("--budget-gib", arguments.budget_gib))
    if arguments.reserved_gib is not None:
        if recipe.device is None:
            raise InputError("--reserved-gib is subtracted from the memory of a --device, and none is named")
        recipe = dataclasses.replace(
            recipe, reserved_bytes=in_bytes("--reserved-gib", arguments.reserved_gib)
        )
    run_on = usable_device(arguments.run_on, "--run-on")
    out = compress(recipe, arguments.path, arguments.data, arguments.out, arguments.pretraining, run_on)
    found = json.loads((out / "search" / "search.json").read_text())
    measures, selected = read_record(out)["measures"], found["candidates"][0]
    if arguments.json:
        print_json({"out": out, "chosen": selected, "budget_bytes": found["budget_bytes"], **measures})
        return
    rows = [[name, size] for name, size in selected["config"].items() if name != "pattern"]
    rows += [["parameters", selected["parameters"]], ["bytes at inference", selected["bytes"]["total"]]]
    rows += [[f"loss, {name}", loss] for name, loss in measures["losses"].items()]
    rows += [
        [f"accuracy, {name}", f"{share['accuracy']:.1%}"] for name, share in measures["accuracy"].items()
    ]
    rows += [["for llama.cpp", out / measures["gguf"]["file"]]] if "gguf" in measures else []
    table(["", "result"], rows, title=f"{out}, for {found['budget']}")


def in_bytes(flag: str, gib: float) -> int:
    """GiB as bytes. Raises InputError where the number is not positive, or beyond any memory."""
    if not 0 < gib < 2**30:
        raise InputError(f"{flag} is {gib}; it must be positive and below 2^30")
    return int(gib * 2**30)
