"""`nanohybrid export gguf PATH OUT`: one file for llama.cpp, with weights, tokenizer and chat template."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from nanohybrid.cli.common import MODEL, command_parser, print_json, table

if TYPE_CHECKING:
    import jsonargparse

    from nanohybrid.export import GgufExport

SUMMARY = "one file for llama.cpp, with weights, tokenizer and chat template"
TYPES = ("bf16", "f16", "f32", "q8_0", "q4_0")


def parser() -> "jsonargparse.ArgumentParser":
    result = command_parser("export gguf", SUMMARY)
    result.add_argument("path", type=Path, metavar="PATH", help=MODEL)
    result.add_argument("out", type=Path, metavar="OUT", help="the file to write, as model.gguf")
    result.add_argument(
        "--type",
        choices=TYPES,
        default="bf16",
        help="type of matrices and embeddings; other parameters are fp32",
    )
    return result


def run(arguments: "jsonargparse.Namespace") -> int:
    """Write the file and print a summary of its contents."""
    from nanohybrid.export import GgufExport
    from nanohybrid.stages.progress import progress

    began = time.monotonic()
    with GgufExport(arguments.path, arguments.type) as export:
        with progress("export", export.bytes, "B") as bar:
            export.write(arguments.out, bar.advance)
        result = summary(export, arguments.out, time.monotonic() - began)
    if arguments.json:
        print_json(result)
    else:
        table(
            ("file", str(arguments.out)),
            [(key.replace("_", " "), value) for key, value in result.items() if key != "out"],
        )
    return 0


def summary(export: "GgufExport", out: Path, seconds: float) -> dict[str, object]:
    """A summary of the written file."""
    vocabulary = export.vocabulary
    return {
        "out": out, "architecture": export.architecture, "type": export.kind, "tensors": len(export.tensors),
        "file_bytes": out.stat().st_size,
        **{f"bytes_{kind}": count for kind, count in export.bytes_by_type.items()},
        "tokenizer": "none (no tokenizer.json); ids only" if vocabulary is None else vocabulary.rule,
        "chat_template": vocabulary is not None and vocabulary.template is not None,
        "seconds": round(seconds, 2),
    }  # fmt: skip
