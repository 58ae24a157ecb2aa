"""Runs one part and writes its rows to OUT/PART.json as it measures them. run_all.py starts it.

python benchmarks/gpu/one_part.py PART OUT [--toy]
"""

import argparse
import importlib
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        if not arguments.toy:
            raise SystemExit("there is no CUDA device; --toy measures nothing, but runs everything on a CPU")
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined
    from bench import Bench
    from parts.device import limits

    part = importlib.import_module(f"parts.{arguments.part}")
    content: dict = {"title": part.TITLE, "machine": machine(), "rows": []}

    def emit(row: dict) -> None:
        content["rows"].append(row)
        (arguments.out / f"{arguments.part}.json").write_text(json.dumps(content, indent=1))

    part.run(Bench.at(arguments.out, arguments.toy, limits), emit)


def machine() -> dict[str, str]:
    import platform

    import torch
    import triton

    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
