"""`nanohybrid data`: raw text and generated problems -> a tokenized corpus."""

from pathlib import Path

import jsonargparse

from nanohybrid.cli.common import print_json, recipe_from, recipe_parser, table
from nanohybrid.data.recipe import DataRecipe

SUMMARY = "raw text -> filtered, deduplicated, tokenized documents"


def parser() -> jsonargparse.ArgumentParser:
    """The flags of DataRecipe."""
    return recipe_parser("data", SUMMARY, DataRecipe)


def run(arguments: jsonargparse.Namespace) -> None:
    """Build the corpus and print its statistics."""
    from nanohybrid.data.build import build
    from nanohybrid.data.describe import read_stats

    out: Path = build(recipe_from(DataRecipe, arguments), arguments.out)
    stats = read_stats(out)
    if arguments.json:
        print_json({"out": out, **stats})
        return
    rows = [
        [name, store["documents"], store["tokens"], store["learned_tokens"], sum(store["dropped"].values())]
        for name, store in stats["stores"].items()
    ]
    table(
        ["store", "documents", "tokens", "tokens with loss", "dropped"],
        rows,
        title=f"{out}: {stats['tokens']:,} tokens",
    )
