"""The output of a training command: its directory, time, tokens and results."""

import json
from pathlib import Path

from nanohybrid.cli.common import print_json, table


def report(out: Path, as_json: bool) -> None:
    """Print the results in the lineage of a stage."""
    lineage = json.loads((out / "lineage.json").read_text())
    result = {
        "out": str(out),
        "seconds": lineage["seconds"],
        "tokens": lineage["tokens"],
        **lineage["measures"],
    }
    if as_json:
        print_json(result)
    else:
        table(["result", "value"], [[key.replace("_", " "), value] for key, value in result.items()])
