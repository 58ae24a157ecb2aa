"""`nanohybrid distill`: a student learns from its teacher."""

from pathlib import Path

import jsonargparse

from nanohybrid.cli.common import MODEL, print_json, recipe_from, recipe_parser, table
from nanohybrid.cli.model_flags import add_device_flag, usable_device

SUMMARY = "train a pruned model towards its teacher (the second half of compress)"


def parser() -> jsonargparse.ArgumentParser:
    """Flags of the command: the checkpoints, the documents, and those of DistillRecipe."""
    from nanohybrid.distill.recipe import DistillRecipe

    result = recipe_parser("distill", SUMMARY, DistillRecipe)
    result.add_argument("student", type=Path, metavar="STUDENT", help=f"what learns: {MODEL}")
    result.add_argument(
        "teacher_path", type=Path, metavar="TEACHER", help="what it learns from, in the same ways"
    )
    add_documents(result)
    add_device_flag(result)
    return result


def add_documents(parser: jsonargparse.ArgumentParser, required: bool = True) -> None:
    """The flags that name token stores."""
    parser.add_argument(
        "--data",
        type=Path,
        required=required,
        metavar="DIR",
        help="documents of post-training: stores, or align's output",
    )
    parser.add_argument(
        "--pretraining",
        type=Path,
        metavar="DIR",
        help="documents of pretraining to mix in: what `nanohybrid data` wrote",
    )


def run(arguments: jsonargparse.Namespace) -> None:
    """Distill, and print the divergence before and after."""
    from nanohybrid.distill.recipe import DistillRecipe
    from nanohybrid.distill.stage import distill
    from nanohybrid.stages.output import read_record

    recipe, device = recipe_from(DistillRecipe, arguments), usable_device(arguments.device)
    out = distill(
        recipe,
        arguments.student,
        arguments.teacher_path,
        arguments.data,
        arguments.out,
        arguments.pretraining,
        device,
    )
    measures = read_record(out)["measures"]
    if arguments.json:
        print_json({"out": out, **measures})
    else:
        rows = [["before", measures["kl_before"]], ["after", measures["kl_after"]]]
        table(["", "divergence from the teacher, nats a token"], rows, title=str(out))
