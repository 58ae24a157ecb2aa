"""The comparison with peers: aggregation, the check of weights, and whole runs with a mock engine."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parents[2] / "benchmarks" / "peers"
STAND_IN = """
import json, sys
if sys.argv[1:] == ["--version"]:
    print("nanohybrid of tomorrow")
    raise SystemExit
assert sys.argv[1:3] == ["bench", "generate"] and "--json" in sys.argv
words = [word for word in sys.argv[4:] if word != "--json"]
flags = dict(zip(words[::2], words[1::2]))
assert set(flags) - {"--repeats"} == {"--dtype", "--prompt-tokens", "--new-tokens", "--batch", "--threads"}
speed = {"bf16": 1, "int8": 2, "int4": 4}[flags["--dtype"]] * int(flags["--batch"])
print(json.dumps({
    "prefill_tokens_per_second": {"median": 100.0 * speed, "min": 90.0 * speed, "max": 110.0 * speed},
    "decode_tokens_per_second": {"median": 10.0 * speed, "min": 9.0 * speed, "max": 12.0 * speed},
    "stream_gb_per_second": 30.0, "matmul_gflops": 400.0, "peak_memory_bytes": 10**9,
    "decode_bandwidth_fraction": 0.5, "prefill_matmul_fraction": 0.8,
}))
"""


@pytest.fixture
def peers(monkeypatch):
    """The modules of the scripts."""
    monkeypatch.syspath_prepend(str(HERE))
    import engines
    import summary

    yield engines, summary
    for name in ("engines", "long", "summary", "run"):
        sys.modules.pop(name, None)


def measured(engines, median, low, high, engine="nanohybrid", kind="bf16", **more):
    speeds = {key: {"median": median, "min": low, "max": high} for key in engines.SPEEDS}
    return engines.Measured(engine, kind, "decode batch 16", {**speeds, "peak_memory_bytes": 7, **more})


def test_aggregate_takes_the_median_over_rounds_and_the_extremes_of_all(peers):
    engines, summary = peers
    rows = [
        measured(engines, *values, decode_bandwidth_fraction=0.5)
        for values in ((10, 9, 30), (20, 8, 21), (12, 11, 13))
    ]
    workloads = {"decode batch 16": engines.Workload(64, 32, 16)}
    (row,) = summary.aggregate(rows, workloads)
    assert (row["measure"], row["median"], row["min"], row["max"]) == ("decode, batch 16", 12, 8, 30)
    assert row["limit"] == 24  # the median of 20, 40 and 24


def test_markdown_gives_the_lead_over_the_best_peer(peers):
    engines, summary = peers
    rows = [
        measured(engines, speed, speed, speed, engine)
        for engine, speed in (("nanohybrid", 30), ("llama.cpp", 20), ("transformers", 5))
    ]
    results = summary.aggregate(rows, {"decode batch 16": engines.Workload(64, 32, 16)})
    result = {
        "engines": {"nanohybrid": "1", "llama.cpp": {"version": "2"}, "transformers": {}},
        "left_out": {}, "results": results,
        "machine": {"cpu": "x", "threads": 2, "cores": 2}, "date": "today", "rounds": 1, "command": "run",
    }  # fmt: skip
    table = summary.markdown(result)
    assert (
        "| decode, batch 16 | bf16 | 30.0 [30.0-30.0] | 20.0 [20.0-20.0] | 5.0 [5.0-5.0] | 1.50x |" in table
    )
    assert "- llama.cpp: version 2" in table


@pytest.mark.parametrize(("error", "refused"), [(0.01, False), (0.5, True), (float("nan"), True)])
def test_engine_check_refuses_logits_of_other_weights(peers, tmp_path, monkeypatch, error, refused):
    engines, _ = peers
    ours = np.linspace(-2, 2, 100, dtype=np.float32)
    np.save(tmp_path / "ours.npy", ours)

    def run(command, threads, as_json=True):
        np.save(command[command.index("--logits") + 1], ours + error * ours.std())
        return {"versions": {"peer": "1"}}

    monkeypatch.setattr(engines, "run", run)
    setting = engines.Setting(tmp_path, {"bf16": tmp_path}, 1, tmp_path, "python", [])
    if refused:
        with pytest.raises(engines.Failed, match="same weights"):
            engines.ENGINES["llama.cpp"].check(setting)
    else:
        assert engines.ENGINES["llama.cpp"].check(setting) == {
            "peer": "1",
            "logits_differ_by": pytest.approx(error, abs=1e-3),
        }


def test_remove_stale_files_removes_those_of_another_model_only(peers, tmp_path):
    engines, _ = peers
    for name in ("first", "second", "out"):
        (tmp_path / name).mkdir()
    for name in ("first", "second"):
        (tmp_path / name / "config.json").write_text("{}")
    file = tmp_path / "out" / "bf16.gguf"
    engines.remove_stale_files(tmp_path / "first", tmp_path / "out")
    file.write_text("of the first")
    engines.remove_stale_files(tmp_path / "first", tmp_path / "out")
    assert file.exists()
    engines.remove_stale_files(tmp_path / "second", tmp_path / "out")
    assert not file.exists()


def test_peers_run_writes_results_table_and_plot(peers, tmp_path, monkeypatch):
    import run

    (tmp_path / "ours.py").write_text(STAND_IN)
    (tmp_path / "python").write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'llama_cpp'\" >&2\nexit 1\n"
    )
    (tmp_path / "python").chmod(0o755)
    flags = [
        "--preset",
        "tiny",
        "--rounds",
        "1",
        "--scale",
        "0.1",
        "--types",
        "int8",
        "--engines",
        "nanohybrid",
        "llama.cpp",
    ]
    ours = ["--ours", sys.executable, str(tmp_path / "ours.py"), "--llama-python", str(tmp_path / "python")]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--out", str(tmp_path / "out"), "--threads", "1", *flags, *ours]
    )
    assert run.main() == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "No module named 'llama_cpp'" in result["left_out"]["llama.cpp"]
    found = {row["measure"]: (row["type"], row["median"]) for row in result["results"]}
    assert found == {
        "prefill 51": ("int8", 200), "decode, batch 1": ("int8", 20), "prefill 205": ("int8", 200),
        "decode, batch 16": ("int8", 320),
    }  # fmt: skip
    assert "llama.cpp is left out" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "results.svg").read_text().startswith("<?xml")
    assert (tmp_path / "out" / "int8.gguf").stat().st_size > 10**5


CHILDREN = {
    "hungry": (
        "import time; held = bytearray(2**28); held[::4096] = b'x' * 2**16; time.sleep(60)",
        "out of memory at 0.125 GiB",
    ),
    "killed": ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
    "refused": ("import sys; sys.exit('RuntimeError: no memory')", "RuntimeError: no memory"),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_long_run_reports_why_an_engine_failed(peers, name):
    import long

    program, reason = CHILDREN[name]
    found = long.row("peer", 100, long.run_within([sys.executable, "-c", program], 1, 2**27))
    assert found["failed"].startswith(reason) and found["process_seconds"] < 30
    assert name != "hungry" or found["peak_memory_bytes"] > 2**27


def test_long_run_has_a_row_for_each_engine(peers, tmp_path, monkeypatch):
    import run

    (tmp_path / "ours.py").write_text(STAND_IN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags = [
        "--preset",
        "tiny",
        "--engines",
        "nanohybrid",
        "--threads",
        "1",
        "--long",
        "500",
        "--memory-gib",
        "1",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        ["run.py", "--out", str(tmp_path), *flags, "--ours", sys.executable, str(tmp_path / "ours.py")],
    )
    assert run.main() == 0
    (found,) = json.loads((tmp_path / "long.json").read_text())["results"]
    assert (found["first_token_seconds"], found["decode_tokens_per_second"]) == (5, 10)
    assert (
        "| nanohybrid | 5.0 s | 100 tok/s, 80% of torch's product | 10.0 tok/s |"
        in (tmp_path / "long.md").read_text()
    )
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("flags", [["--long", "0"], ["--long", "--memory-gib", "0"]])
def test_long_run_refuses_a_prompt_of_no_tokens(peers, monkeypatch, capsys, flags):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--out", "nowhere", *flags])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "both must be more than 0" in capsys.readouterr().err
