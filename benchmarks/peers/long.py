"""One long prompt through each engine, in processes with a memory limit: time and memory, or the failure.

The limit is enforced by polling: ten times a second the memory of the process is read, and the process is
killed if it is more. A limit of the address space would count memory that is reserved and never touched,
which differs more between engines.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import ENGINES, SPEEDS, Failed, Setting, Workload, environment

POLL_SECONDS = 0.1
NEW_TOKENS = 16
KIND = "bf16"


@dataclass(frozen=True)
class Outcome:
    """The result of a process: what it printed or why it failed, its peak memory, and its time."""

    values: dict[str, Any] | None
    reason: str
    peak_bytes: int
    seconds: float


def measure_long(setting: Setting, engines: list[str], tokens: int, limit: int) -> list[dict[str, Any]]:
    """A row for each engine, including those that fail or are killed. limit: bytes."""
    rows = []
    for engine in engines:
        flags = Workload(tokens, NEW_TOKENS, 1).flags(setting.threads)
        outcome = run_within(
            [*ENGINES[engine].command(setting, KIND), *flags, "--repeats", "1"], setting.threads, limit
        )
        rows.append(row(engine, tokens, outcome))
        print(f"{engine}  {as_text(rows[-1])}", file=sys.stderr, flush=True)
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
    """Run a child that prints one JSON object last; kill it when its memory is more than `limit` bytes."""
    began, peak, ended = time.monotonic(), 0, False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, text=True, env=environment(threads))
        try:
            while child.poll() is None:
                peak = max(peak, peak_memory(child.pid))
                if peak > limit:
                    ended = True
                    break
                time.sleep(POLL_SECONDS)
        finally:
            child.kill()
            child.wait()
        seconds = time.monotonic() - began
        if ended:
            return Outcome(
                None, f"out of memory at {limit / 2**30:g} GiB after {seconds:.0f} s", peak, seconds
            )
        out.seek(0), err.seek(0)
        printed, errors = out.read().strip(), err.read().strip()
    if child.returncode == 0:
        return Outcome(json.loads(printed.splitlines()[-1]), "", peak, seconds)
    word = (errors or printed or f"exit code {child.returncode}").splitlines()[-1]
    return Outcome(
        None, word if child.returncode > 0 else f"ended by signal {-child.returncode}", peak, seconds
    )


def peak_memory(pid: int) -> int:
    """The peak memory of a running process in bytes; 0 once it has ended. Raises Failed without /proc."""
    if not Path("/proc/self/status").exists():
        raise Failed("a memory limit needs /proc, which this system does not have")
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def as_text(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    gib = found["peak_memory_bytes"] / 2**30
    return f"first token after {found['first_token_seconds']:.1f} s, {gib:.2f} GiB"


def markdown(result: dict[str, Any]) -> str:
    """A table with a row for each engine."""
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
        f"{result['tokens']:,} tokens in {KIND}, {machine['cpu']},"
        f" {machine['threads']} of {machine['cores']} cores, {result['date']}",
    ]
    lines += [f"- {name} is left out: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join([*lines, "", f"`{result['command']}`", ""])
