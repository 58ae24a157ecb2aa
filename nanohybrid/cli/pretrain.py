"""`nanohybrid pretrain`: documents -> a base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import recipe_from, recipe_parser
from nanohybrid.cli.outcome import report

if TYPE_CHECKING:
    import jsonargparse

SUMMARY = "documents -> a base model"


def parser() -> "jsonargparse.ArgumentParser":
    from nanohybrid.train import PretrainRecipe

    result = recipe_parser("pretrain", SUMMARY, PretrainRecipe)
    result.add_argument("--data", type=Path, required=True, metavar="DIR", help="what `nanohybrid data` wrote: token stores and tokenizer")
    return result


def run(arguments: "jsonargparse.Namespace") -> None:
    from nanohybrid.train import PretrainRecipe, pretrain

    report(pretrain(recipe_from(PretrainRecipe, arguments), arguments.data, arguments.out), arguments.json)
