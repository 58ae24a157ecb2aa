"""One long prompt through each engine, in a process of its own under a memory limit: what it takes, or where
it ends.

The limit is kept by looking: ten times a second at what the process holds, which is ended when that is more.
A limit of the address space would count what is reserved and never touched, which differs by engine more than
what is used."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import ENGINES, SPEEDS, Failed, Setting, Workload, environment

LOOK = 0.1  # seconds between looks at a process
NEW_TOKENS = 16
KIND = "bf16"


@dataclass(frozen=True)
class Outcome:
    """What came of a process: what it printed, or why it did not; the most it held, and how long it took."""

    values: dict[str, Any] | None
    reason: str
    peak_bytes: int
    seconds: float


def measure_long(setting: Setting, engines: list[str], tokens: int, limit: int) -> list[dict[str, Any]]:
    """A row an engine; one that fails or is ended is a row too. `limit`: bytes."""
    rows = []
    for engine in engines:
        flags = Workload(tokens, NEW_TOKENS, 1).flags(setting.threads)
        outcome = run_within(
            [*ENGINES[engine].command(setting, KIND), *flags, "--repeats", "1"], setting.threads, limit
        )
        rows.append(row(engine, tokens, outcome))
        print(f"{engine}  {told(rows[-1])}", file=sys.stderr, flush=True)
    return rows


def row(engine: str, tokens: int, outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {
        "engine": engine,
        "peak_memory_bytes": outcome.peak_bytes,
        "process_seconds": outcome.seconds,
    }
    if outcome.values is None:
        return {**found, "failed": outcome.reason}
    prefill, decode = (outcome.values[key]["median"] for key in SPEEDS)
    share = outcome.values.get("prefill_matmul_fraction")
    return {
        **found,
        "first_token_seconds": tokens / prefill,
        SPEEDS[0]: prefill,
        SPEEDS[1]: decode,
        "prefill_matmul_fraction": share,
    }


def run_within(command: list[str], threads: int, limit: int) -> Outcome:
    """Run a child that prints one JSON object last, and end it when it holds more than `limit` bytes."""
    began, peak, ended = time.monotonic(), 0, False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, text=True, env=environment(threads))
        try:
            while child.poll() is None:
                peak = max(peak, most_held(child.pid))
                if peak > limit:
                    ended = True
                    break
                time.sleep(LOOK)
        finally:
            child.kill()
            child.wait()
        seconds = time.monotonic() - began
        if ended:
            return Outcome(
                None, f"out of memory at {limit / 2**30:g} GiB after {seconds:.0f} s", peak, seconds
            )
        out.seek(0), err.seek(0)
        said, complaint = out.read().strip(), err.read().strip()
    if child.returncode == 0:
        return Outcome(json.loads(said.splitlines()[-1]), "", peak, seconds)
    word = (complaint or said or f"exit code {child.returncode}").splitlines()[-1]
    return Outcome(
        None, word if child.returncode > 0 else f"ended by signal {-child.returncode}", peak, seconds
    )


def most_held(pid: int) -> int:
    """The most memory that a running process has held, in bytes; 0 once it has ended. Raises Failed where
    there is no /proc.
    """
    if not Path("/proc/self/status").exists():
        raise Failed("a memory limit is kept by reading /proc, which is not here")
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def told(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    return f"first token after {found['first_token_seconds']:.1f} s, {found['peak_memory_bytes'] / 2**30:.2f} GiB"  # noqa: E501


def markdown(result: dict[str, Any]) -> str:
    """A row an engine."""
    lines = ["| | first token | prompt | decode after it | most memory |", "|---|---|---|---|---|"]
    for found in result["results"]:
        memory = f"{found['peak_memory_bytes'] / 2**30:.2f} GiB"
        if "failed" in found:
            lines.append(f"| {found['engine']} | {found['failed']} | | | {memory} |")
            continue
        share = found["prefill_matmul_fraction"]
        of = f", {share:.0%} of torch's product" if share else ""
        speeds = f"{found[SPEEDS[0]]:,.0f} tok/s{of} | {found[SPEEDS[1]]:.1f} tok/s"
        lines.append(f"| {found['engine']} | {found['first_token_seconds']:.1f} s | {speeds} | {memory} |")
    machine = result["machine"]
    lines += [
        "",
        f"{result['tokens']:,} tokens in {KIND}, {machine['cpu']}, {machine['threads']} of "
        f"{machine['cores']} cores, {result['date']}",
    ]
    lines += [f"- {name} is left out: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join([*lines, "", f"`{result['command']}`", ""])
