"""Check and measure everything on one GPU, in one call of less than ten minutes.

    python benchmarks/gpu/run_all.py --out results                     # all parts, in order, within --minutes
    python benchmarks/gpu/run_all.py --out results --resume            # the parts that are not complete
    python benchmarks/gpu/run_all.py --out results --only check,train  # these parts
    python benchmarks/gpu/run_all.py --out results --toy               # toy sizes, also on a CPU

A part is a file of benchmarks/gpu/parts and runs in its own process: a crash, a hang or lack of memory ends
only that part, and its rows so far are saved. Each part writes OUT/PART.json as it runs. OUT/results.json and
OUT/results.md have all parts, those of earlier calls included. The exit code is 1 where a part failed or a
check did not pass.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from report import markdown

LIMITS = {  # seconds of each part, in the order in which they run
    "device": 40,
    "check": 140,
    "kernels": 100,
    "decode": 90,
    "prefill": 60,
    "train": 120,
    "compare": 150,
}
MIN_SECONDS = 15  # no further part starts with less time


def main() -> int:
    arguments = parse()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    for part in arguments.only:
        if arguments.resume and read(out, part).get("complete"):
            continue
        left = end - time.monotonic()
        if left < MIN_SECONDS:
            print(f"{part}: no time left; --resume continues here", file=sys.stderr)
            continue
        run(part, out, min(left, arguments.limit or LIMITS[part]), arguments.toy)
        write(out)  # after every part, since the call may be ended at any time
    write(out)
    print((out / "results.md").read_text())
    return int(any(failed(read(out, part)) for part in arguments.only))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory of the results")
    parser.add_argument(
        "--only", type=parts, default=list(LIMITS), metavar="PART,PART", help=f"of {', '.join(LIMITS)}"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out the parts that are complete in --out"
    )
    parser.add_argument("--limit", type=float, help="seconds of each part, in place of its own limit")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole call")
    parser.add_argument("--toy", action="store_true", help="sizes that a CPU can do")
    return parser.parse_args()


def parts(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(LIMITS):
        raise argparse.ArgumentTypeError(
            f"no part is called {', '.join(sorted(unknown))}; they are {', '.join(LIMITS)}"
        )
    return chosen


def run(part: str, out: Path, limit: float, toy: bool) -> None:
    """Run one part in its own process, with a log file beside its rows."""
    (out / f"{part}.json").unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, Path(__file__).with_name("one_part.py"), part, out] + ["--toy"] * toy
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with open(out / f"{part}.log", "w") as log:
        try:
            code = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                timeout=limit,
                env=os.environ | {"PYTHONPATH": path},
                check=False,
            ).returncode
            problem = None if code == 0 else f"exit code {code}, see {part}.log"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
    seconds = round(time.monotonic() - began, 1)
    found = (
        {"rows": []} | read(out, part) | {"complete": problem is None, "problem": problem, "seconds": seconds}
    )
    (out / f"{part}.json").write_text(json.dumps(found, indent=1))
    print(f"{part}: {problem or 'done'}, {seconds} s, {len(found['rows'])} rows", file=sys.stderr)


def read(out: Path, part: str) -> dict:
    file = out / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def failed(found: dict) -> bool:
    return not found.get("complete") or any(row.get("passed") is False for row in found["rows"])


def write(out: Path) -> None:
    found = {part: content for part in LIMITS if (content := read(out, part))}
    (out / "results.json").write_text(json.dumps(found, indent=1))
    (out / "results.md").write_text(markdown(found))


if __name__ == "__main__":
    sys.exit(main())
