"""`nanohybrid pretrain`: documents -> a base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import recipe_from, recipe_parser
from nanohybrid.cli.model_flags import add_device_flag, usable_device
from nanohybrid.cli.outcome import report

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "documents -> a base model"


def parser() -> "jsonargparse.ArgumentParser":
    from nanohybrid.train import PretrainRecipe

    result = recipe_parser("pretrain", SUMMARY, PretrainRecipe)
    result.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `nanohybrid data` wrote: token stores and tokenizer",
    )
    add_device_flag(result)
    return result


def run(arguments: "jsonargparse.Namespace") -> None:
    from nanohybrid.train import PretrainRecipe, pretrain

    device = usable_device(arguments.device)
    report(
        pretrain(recipe_from(PretrainRecipe, arguments), arguments.data, arguments.out, device),
        arguments.json,
    )
