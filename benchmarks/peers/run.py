"""nanohybrid, llama.cpp and transformers on the same weights, threads and lengths, alternating A B A B.

    python benchmarks/peers/run.py --preset nano-291m --out runs/peers
    python benchmarks/peers/run.py --model DIR --out runs/peers --llama-python .venv-llama/bin/python
    python benchmarks/peers/run.py --preset nano-291m --out runs/peers --long 32768 --memory-gib 18

It takes about twenty minutes on two cores of an otherwise idle machine. Every measurement is its own process,
so that no engine's threads disturb another's. In a round, each engine runs each workload once. Results are
medians over the rounds with minimum and maximum. Before anything is timed, each peer's logits are compared
with ours in fp32; a peer with different weights is left out.

An engine that is not installed is left out, with the reason. For llama.cpp: `pip install llama-cpp-python`
(built from source; with CMAKE_ARGS="-DGGML_NATIVE=ON" for this CPU), here or in another environment, whose
Python is given by `--llama-python`.

Writes results.json, results.md and results.svg to --out, beside the GGUF files and the model that it makes.
With --long, it runs one prompt of that many tokens once through each engine in bf16, kills an engine with
more than --memory-gib, and writes long.json and long.md.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

from engines import (
    ENGINES,
    ROOT,
    TYPES,
    Failed,
    Measured,
    Setting,
    Workload,
    export_gguf,
    make_model,
    measure,
    remove_stale_files,
)
from long import KIND, measure_long
from long import markdown as long_markdown
from summary import aggregate, markdown, plot

WORKLOADS = {
    "prefill 512, decode batch 1": Workload(prompt_tokens=512, new_tokens=64, batch=1),
    "prefill 2,048": Workload(prompt_tokens=2048, new_tokens=16, batch=1),
    "decode batch 16": Workload(prompt_tokens=64, new_tokens=32, batch=16),
}


def main() -> int:
    arguments = _arguments()
    sys.path.insert(0, str(ROOT))
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or make_model(arguments.preset, arguments.out / "model")
    remove_stale_files(model, arguments.out)
    kinds = [KIND] if arguments.long else arguments.types
    files = {
        kind: export_gguf(model, arguments.out / f"{kind}.gguf", kind)
        for kind in kinds
        if "llama.cpp" in arguments.engines
    }
    setting = Setting(model, files, arguments.threads, arguments.out, arguments.llama_python, arguments.ours)
    engines, left_out = _usable(setting, arguments.engines)
    result = {
        "machine": machine(arguments.threads), "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "model": str(model), "engines": engines, "left_out": left_out,
    }  # fmt: skip
    if arguments.long:
        rows = measure_long(setting, list(engines), arguments.long, round(arguments.memory_gib * 2**30))
        result |= {"tokens": arguments.long, "memory_gib": arguments.memory_gib, "results": rows}
        text = long_markdown(result)
    else:
        result |= _compared(setting, engines, arguments)
        text = markdown(result)
        plot(result, arguments.out / "results.svg")
    name = "long" if arguments.long else "results"
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(text)
    print(text)
    return 0


def _compared(
    setting: Setting, engines: dict[str, object], arguments: argparse.Namespace
) -> dict[str, object]:
    """All engines on all workloads, by turns."""
    workloads = {name: workload.scaled(arguments.scale) for name, workload in WORKLOADS.items()}
    rows = _rounds(setting, engines, workloads, arguments.types, arguments.rounds)
    return {"rounds": arguments.rounds, "results": aggregate(rows, workloads)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a checkpoint directory; without it, random weights of --preset"
    )
    parser.add_argument("--preset", default="nano-291m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--scale", type=float, default=1.0, help="scale of all lengths; 0.1 for a quick try")
    parser.add_argument(
        "--long",
        nargs="?",
        type=int,
        const=32768,
        metavar="TOKENS",
        help="one prompt of TOKENS (32768) in place of the workloads",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=18.0,
        metavar="G",
        help="with --long, the memory limit of each process",
    )
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama_cpp")
    parser.add_argument(
        "--ours",
        nargs="+",
        default=[sys.executable, "-m", "nanohybrid"],
        help="the command of nanohybrid, for example of another version",
    )
    arguments = parser.parse_args()
    if arguments.long is not None and (arguments.long < 1 or not arguments.memory_gib > 0):
        parser.error(
            f"--long is {arguments.long} tokens and --memory-gib is {arguments.memory_gib:g}: "
            "both must be more than 0"
        )
    return arguments


def _usable(setting: Setting, names: list[str]) -> tuple[dict[str, object], dict[str, str]]:
    """Versions of the engines that are installed and correct, and why the others are left out."""
    engines: dict[str, object] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            engines[name] = ENGINES[name].check(setting)
        except Failed as error:
            left_out[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    return engines, left_out


def _rounds(
    setting: Setting,
    engines: dict[str, object],
    workloads: dict[str, Workload],
    types: list[str],
    rounds: int,
) -> list[Measured]:
    rows = []
    for turn in range(rounds):
        for name, workload in workloads.items():
            for kind in types:
                for engine in engines:
                    if kind not in ENGINES[engine].types:
                        continue
                    row = measure(setting, engine, kind, name, workload)
                    rows.append(row)
                    print(
                        f"round {turn + 1}/{rounds}  {name}  {kind}  {engine}  {row.short()}",
                        file=sys.stderr,
                        flush=True,
                    )
    return rows


def machine(threads: int) -> dict[str, object]:
    """The machine of the measurements."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
