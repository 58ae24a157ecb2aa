"""The output directory of a stage appears when complete, resumes, and belongs to one run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch

from nanohybrid.errors import InputError
from nanohybrid.stages import open_stage
from nanohybrid.stages.output import lock


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Recipe:
    steps: int = 3
    optimizer: Optimizer = field(default_factory=Optimizer)


def test_open_stage_leaves_a_complete_directory_after_a_clean_exit(tmp_path):
    out = tmp_path / "out"
    with open_stage(out, "demo", Recipe(), seed=7) as stage:
        assert not out.exists()
        (stage.directory / "result.txt").write_text("42")
        stage.log("loss", step=1, loss=2.5)
        stage.measure(accuracy=0.5)
        stage.spend(tokens=100)
    assert not (tmp_path / "out.partial").exists()
    names = {path.name for path in out.iterdir()}
    assert names == {"result.txt", "recipe.toml", "lineage.json", "metrics", "report.html"}
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["measures"] == {"accuracy": 0.5}
    assert (lineage["seed"], lineage["tokens"], lineage["stage"]) == (7, 100, "demo")
    assert lineage["made_with"]["version"] and lineage["peak_memory_bytes"] > 0
    assert "learning_rate" in (out / "report.html").read_text()


def test_open_stage_reuses_a_complete_directory(tmp_path):
    for run in range(2):
        with open_stage(tmp_path / "out", "demo", Recipe()) as stage:
            assert stage.complete == (run == 1)
            if not stage.complete:
                stage.measure(run=run)
    assert stage.measures == {"run": 0} and stage.directory == tmp_path / "out"


def test_open_stage_refuses_another_recipe_and_names_what_differs(tmp_path):
    with open_stage(tmp_path / "out", "demo", Recipe()):
        pass
    with pytest.raises(InputError, match=r"another run \(optimizer.learning_rate\): give another --out"):
        with open_stage(tmp_path / "out", "demo", replace(Recipe(), optimizer=Optimizer(1.0))):
            pass
    with pytest.raises(InputError, match="seed"):
        with open_stage(tmp_path / "out", "demo", Recipe(), seed=1):
            pass


def test_open_stage_finds_a_run_whose_recipe_was_stored_with_old_key_names(tmp_path):
    """A run of an older version is the same run: its stored recipe is compared under the new names."""

    @dataclass(frozen=True)
    class Renamed(Optimizer):
        RENAMED: ClassVar[dict[str, str]] = {"lr": "learning_rate"}

    out = tmp_path / "out"
    with open_stage(out, "demo", Renamed()):
        pass
    record = json.loads((out / "lineage.json").read_text())
    (out / "lineage.json").write_text(json.dumps({**record, "recipe": {"lr": 1e-3}}))
    with open_stage(out, "demo", Renamed()) as stage:
        assert stage.complete
    (out / "lineage.json").write_text(json.dumps({**record, "recipe": {"lr": 2e-3}}))
    with (
        pytest.raises(InputError, match=r"another run \(learning_rate\)"),
        open_stage(out, "demo", Renamed()),
    ):
        pass


def test_open_stage_identifies_inputs_by_content(tmp_path):
    for name, text in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(text)
    with open_stage(tmp_path / "out", "demo", Recipe(), {"data": tmp_path / "a"}):
        pass
    with open_stage(tmp_path / "out", "demo", Recipe(), {"data": tmp_path / "b"}) as stage:
        assert stage.complete
    with pytest.raises(InputError, match=r"inputs\.data"):
        with open_stage(tmp_path / "out", "demo", Recipe(), {"data": tmp_path / "c"}):
            pass
    with pytest.raises(InputError, match="no such file"):
        with open_stage(tmp_path / "out", "demo", Recipe(), {"data": tmp_path / "d"}):
            pass


def test_open_stage_refuses_a_directory_that_is_no_stage_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not the output of a stage"):
        with open_stage(tmp_path / "out", "demo", Recipe()):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_open_stage_fills_an_empty_directory(tmp_path):
    with open_stage(tmp_path, "demo", Recipe()) as stage:
        stage.measure(a=1)
    assert (tmp_path / "lineage.json").exists()


def test_open_stage_keeps_work_after_an_exception_and_resumes(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        with open_stage(out, "demo", Recipe()) as stage:
            (stage.directory / "half").write_text("work")
            stage.measure(seen=1)
            raise KeyboardInterrupt
    assert not out.exists()
    with pytest.raises(InputError, match="unfinished work of another run"):
        with open_stage(out, "demo", Recipe(steps=4)):
            pass
    with open_stage(out, "demo", Recipe()) as stage:
        assert stage.resumed and stage.measures == {"seen": 1}
        assert (stage.directory / "half").read_text() == "work"
    assert (out / "half").exists()


def test_open_stage_removes_the_directory_after_an_error_before_any_work(tmp_path):
    with pytest.raises(InputError):
        with open_stage(tmp_path / "out", "demo", Recipe()):
            raise InputError("no such thing")
    assert list(tmp_path.iterdir()) == []


def test_open_stage_locks_its_directory(tmp_path):
    with (
        open_stage(tmp_path / "out", "demo", Recipe()) as stage,
        pytest.raises(InputError, match="another process"),
        lock(stage.directory),
    ):
        pass


def test_stage_stores_numpy_and_torch_numbers(tmp_path):
    with open_stage(tmp_path / "out", "demo", Recipe()) as stage:
        stage.measure(accuracy=numpy.float32(0.5), curve=torch.tensor([1.0, 2.0]), where=Path("a"))
        stage.log("loss", loss=torch.tensor(2.0))
        assert stage.series("loss") == [{"loss": 2.0}]
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["measures"] == {"accuracy": 0.5, "curve": [1.0, 2.0], "where": "a"}


def test_stage_rewind_drops_rows_from_a_bound_on(tmp_path):
    with open_stage(tmp_path / "out", "demo", Recipe()) as stage:
        for step in range(5):
            stage.log("loss", step=step)
        stage.rewind("loss", step=3)
        stage.rewind("never-logged", step=3)
        assert [row["step"] for row in stage.series("loss")] == [0, 1, 2]


WORKER = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from nanohybrid.stages import open_stage
from nanohybrid.files import atomic_write

@dataclass(frozen=True)
class Recipe:
    steps: int = 1000

with open_stage(Path(sys.argv[1]), "demo", Recipe()) as stage:
    state = stage.directory / "state"
    first = int(state.read_text()) if state.exists() else 0
    stage.rewind("steps", step=first)
    stage.measure(resumed=stage.resumed)
    for step in range(first, int(sys.argv[2])):
        stage.log("steps", step=step)
        atomic_write(state, str(step + 1))
        print(step, flush=True)
        time.sleep(0.001)
"""


def test_stage_killed_in_the_middle_is_finished_by_the_same_command(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", WORKER, str(out)]
    with subprocess.Popen([*command, "1000000"], stdout=subprocess.PIPE, text=True) as worker:
        for line in worker.stdout:
            if int(line) >= 20:
                break
        worker.send_signal(signal.SIGKILL)
    assert not out.exists() and (tmp_path / "out.partial").exists()
    with open(tmp_path / "out.partial" / "metrics" / "steps.jsonl", "a") as file:
        file.write('{"step": 9')  # as a kill in the middle of a write would
    (tmp_path / "out.partial" / ".state.writing").write_text("ha")
    steps = int((tmp_path / "out.partial" / "state").read_text()) + 10
    subprocess.run([*command, str(steps)], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(steps))
    assert json.loads((out / "lineage.json").read_text())["measures"] == {"resumed": True}
    assert not list(out.glob(".*"))


def test_open_stage_refuses_a_directory_that_another_process_works_on(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "out")]
    with subprocess.Popen([*command, "1000000"], stdout=subprocess.PIPE, text=True) as worker:
        worker.stdout.readline()
        second = subprocess.run([*command, "1"], capture_output=True, text=True)
        worker.kill()
    assert "another process is working on it" in second.stderr


def test_stage_saves_its_statistics_every_few_seconds(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with open_stage(tmp_path / "out", "demo", Recipe()) as stage:
        stage.spend(tokens=5)
        stored = json.loads((stage.directory / "lineage.json").read_text())
        assert stored["tokens"] == 5 and stored["seconds"] > 0


def test_open_stage_resolves_relative_paths_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_stage(Path("out"), "demo", Recipe()) as stage:
        stage.measure(a=1)
        os.chdir("/")
    assert (tmp_path / "out" / "lineage.json").exists()


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_open_stage_refuses_seeds_out_of_range(tmp_path, seed):
    with (
        pytest.raises(InputError, match="the seed is"),
        open_stage(tmp_path / "out", "demo", Recipe(), seed=seed),
    ):
        pass
    assert not any(tmp_path.iterdir())
