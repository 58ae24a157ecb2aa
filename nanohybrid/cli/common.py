"""What the commands share: parsers made from recipes, and results printed as a table or as JSON."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from nanohybrid.cli.parser import CommandParser
from nanohybrid.stages.plain import to_json
from nanohybrid.stages.recipe import from_namespace as recipe_from
from nanohybrid.stages.report import format_value, is_number

if TYPE_CHECKING:
    import torch

__all__ = ["command_parser", "print_json", "recipe_from", "recipe_parser", "table"]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names of flags -> names of torch
FORMATS = ("int8", "int4", "fp8")  # of quantized weights, see ops/quantized
MODEL = "a checkpoint directory, a .gguf file, or an id of the Hugging Face Hub (org/name, org/name@revision)"
API_KEY = "NANOHYBRID_API_KEY"  # environment variable of the server and of its clients
OWN_FLAGS = ("recipe", "out", "json")


def command_parser(command: str, summary: str) -> CommandParser:
    """The parser of `nanohybrid COMMAND`, with the flag that every command has: `--json`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = CommandParser(
        prog=f"nanohybrid {command}", description=summary, parser_mode="toml", exit_on_error=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def recipe_parser(command: str, summary: str, recipe: type, *, out: str | None = None) -> CommandParser:
    """The parser of a stage: `--recipe FILE.toml`, one flag for each field of the dataclass `recipe`, and
    `--out`.

    Flags that follow `--recipe` override the file. `out` is the default directory; without it `--out` is
    required. After parsing, `recipe_from(recipe, arguments)` gives the recipe. The caller adds the inputs
    (`--data`, `--model`). Raises ValueError where a field of the recipe has the name of a flag that every
    stage has.
    """
    taken = {field.name for field in dataclasses.fields(recipe)} & set(OWN_FLAGS)
    if taken:
        raise ValueError(
            f"{recipe.__name__} has fields named {sorted(taken)}, which are flags of every stage"
        )
    parser = command_parser(command, summary)
    default = {"required": True} if out is None else {"default": Path(out)}
    parser.add_argument("--out", type=Path, metavar="DIR", help="the output directory", **default)
    parser.add_recipe(recipe)
    return parser


def precision(name: str) -> "tuple[torch.dtype | None, str | None]":
    """The meaning of `--dtype NAME` of a plan: dtype of unquantized parameters, and format of the matrices;
    None is as stored."""
    import torch

    if name in FORMATS:
        return torch.bfloat16, name
    return (getattr(torch, DTYPES[name]), None) if name in DTYPES else (None, None)


def spelled(dtype: "torch.dtype", format: str | None = None) -> str:
    """The name of a precision: `bfloat16`, or `int8` for quantized matrices."""
    return str(dtype).removeprefix("torch.") if format is None else format


def print_json(result: Any) -> None:
    """Print one JSON object to stdout; paths become strings, dataclasses become objects."""
    print(to_json(result))


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table to stdout; columns of numbers are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for index, header in enumerate(headers):
        numbers = bool(cells) and all(is_number(row[index]) for row in cells)
        result.add_column(header, justify="right" if numbers else "left")
    for row in cells:
        result.add_row(*(Text(format_value(value)) for value in row))
    Console().print(result)
