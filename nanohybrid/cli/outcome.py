"""What a training command says when it is done: where the checkpoint lies, what was measured, how to go on."""

import json
from pathlib import Path

from nanohybrid.cli.common import print_json, table


def report(out: Path, as_json: bool) -> None:
    """Print the measures that a stage left in its lineage."""
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
        table(["measure", "value"], [[key.replace("_", " "), value] for key, value in result.items()])
