"""benchmarks/gpu/run_all.py at toy sizes on a CPU: all its parts, resumed, and with a time limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/run_all.py"


def call(out: Path, *flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, SCRIPT, "--toy", "--out", out, *flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_gpu_benchmark_resumes_after_a_complete_part(tmp_path):
    done = call(tmp_path, "--only", "device")
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "device.json").read_text()
    rows = {row["what"]: row["value"] for row in json.loads(first)["rows"]}
    assert rows["copy bandwidth, bytes/s"] > 1e8 and rows["bf16 product, FLOP/s"] > 1e7
    assert (
        "## device" in done.stdout
        and json.loads((tmp_path / "results.json").read_text())["device"]["complete"]
    )
    call(tmp_path, "--only", "device", "--resume")
    assert (tmp_path / "device.json").read_text() == first


def test_gpu_benchmark_stops_and_reports_a_part_that_takes_too_long(tmp_path):
    done = call(tmp_path, "--only", "compare", "--limit", "0.3")
    assert done.returncode == 1 and "stopped after 0 s" in done.stderr
    found = json.loads((tmp_path / "compare.json").read_text())
    assert not found["complete"] and "Not complete" in (tmp_path / "results.md").read_text()


def test_gpu_benchmark_refuses_an_unknown_part(tmp_path):
    done = call(tmp_path, "--only", "everything")
    assert done.returncode == 2 and "no part is called everything" in done.stderr


@pytest.mark.slow
def test_gpu_benchmark_runs_all_parts(tmp_path):
    done = call(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stderr
    assert set(found) == {"device", "check", "kernels", "decode", "prefill", "train", "compare"}
    assert all(part["complete"] and part["rows"] for part in found.values())
    assert all(row["passed"] for row in found["check"]["rows"]) and len(found["check"]["rows"]) > 20
