"""The output directory of a stage. It appears when it is complete, and not before.

A stage maps a recipe and input files to one directory, OUT. It works in OUT.partial, which is renamed to OUT
on a clean exit. A killed stage leaves no OUT; the same command finds OUT.partial and resumes. OUT has the
result of the stage, `recipe.toml`, `lineage.json`, `metrics/*.jsonl` and `report.html`.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanohybrid.errors import InputError
from nanohybrid.files import atomic_write, publish
from nanohybrid.stages import recipe as recipes
from nanohybrid.stages.fingerprint import covers_whole_input, fingerprint
from nanohybrid.stages.lineage import LINEAGE, made_with, peak_memory_bytes
from nanohybrid.stages.plain import to_json
from nanohybrid.stages.report import stage_report

RECIPE, REPORT, METRICS = "recipe.toml", "report.html", "metrics"
SAVE_SECONDS = 5.0


class Stage:
    """A running stage: its directory, its log and its lineage. Made by `open_stage`.

    out        the final output directory
    directory  where to write now: OUT.partial, or OUT after completion
    complete   whether OUT has the complete output of this run
    resumed    whether OUT.partial has unfinished work of this run
    """

    def __init__(
        self, out: Path, directory: Path, record: dict[str, Any], *, complete: bool, resumed: bool
    ) -> None:
        self.out = out
        self.directory = directory
        self.complete = complete
        self.resumed = resumed
        self.record = record
        self.counted = self.saved = time.monotonic()

    def measure(self, **values: Any) -> None:
        """Store results (numbers, lists, tables) under "measures" in lineage.json."""
        self.record["measures"].update(values)
        self.save()

    @property
    def measures(self) -> dict[str, Any]:
        """The results stored so far."""
        return dict(self.record["measures"])

    def spend(self, *, tokens: int) -> None:
        """Count processed tokens. Tokens that are processed again after a kill count again."""
        self.record["tokens"] += tokens
        self.save_periodically()

    def log(self, series: str, **values: Any) -> None:
        """Append a row to metrics/SERIES.jsonl."""
        path = self.series_path(series)
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(to_json(values) + "\n")
        self.save_periodically()

    def series(self, name: str) -> list[dict[str, Any]]:
        """The rows logged so far, also by an interrupted run."""
        path = self.series_path(name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rewind(self, name: str, **bound: float) -> None:
        """Drop the rows from a bound on (`step=100`). A run that resumes there logs them again."""
        rows = [row for row in self.series(name) if all(row[key] < limit for key, limit in bound.items())]
        if self.series_path(name).exists():
            atomic_write(self.series_path(name), "".join(to_json(row) + "\n" for row in rows))

    def series_path(self, name: str) -> Path:
        """The file of a series."""
        return self.directory / METRICS / f"{name}.jsonl"

    def save_periodically(self) -> None:
        """Write lineage.json if SAVE_SECONDS have passed, so a killed stage loses only seconds of its
        statistics."""
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Update time and memory, and write lineage.json."""
        now = time.monotonic()
        self.record["seconds"] = round(self.record["seconds"] + now - self.counted, 3)
        self.record["peak_memory_bytes"] = max(self.record["peak_memory_bytes"], peak_memory_bytes())
        self.counted = self.saved = now
        atomic_write(self.directory / LINEAGE, to_json(self.record, indent=2) + "\n")


@contextmanager
def open_stage(
    out: Path,
    name: str,
    recipe: Any,
    inputs: Mapping[str, Path] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Iterator[Stage]:
    """Open the output directory `out` of the stage `name`. The body of the `with` fills it.

    recipe  a dataclass; with the inputs and the seed it identifies the run
    inputs  files or directories by name, which are identified by their contents
    device  where the body computes; it is recorded, but is not part of the run's identity

    If OUT has the complete output of this run, `stage.complete` is true, and the body must return at once.
    Raises InputError where OUT or OUT.partial belongs to another run, or another process works on it.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"the seed is {seed}; it must be from 0 to 2^63 - 1")
    out = Path(os.path.abspath(out))
    identity = identify(name, recipe, inputs or {}, seed)
    if is_complete(out, identity, type(recipe)):
        yield Stage(out, out, read_record(out), complete=True, resumed=False)
        return
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial):
        stage = start_or_resume(out, partial, identity, recipe, device)
        try:
            yield stage
        except BaseException:
            keep_or_remove(stage)
            raise
        complete(stage)


def identify(name: str, recipe: Any, inputs: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """The identity of a run: stage, recipe, seed, and the hashes of its inputs."""
    hashes = {key: fingerprint(Path(path)) for key, path in inputs.items()}
    identity = {"stage": name, "seed": seed, "inputs": hashes, "recipe": recipes.to_dict(recipe)}
    return json.loads(to_json(identity))


def is_complete(out: Path, identity: dict[str, Any], kind: type) -> bool:
    """Whether `out` holds the complete output of this run. Raises InputError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / LINEAGE).is_file():
        raise InputError(f"{out} exists and is not the output of a stage: give another --out")
    check_same(out, "another run", read_record(out), identity, kind)
    return True


def start_or_resume(
    out: Path, partial: Path, identity: dict[str, Any], recipe: Any, device: str | None
) -> Stage:
    """Resume the unfinished work in `partial`, or start there. Raises InputError for work of another run."""
    resumed, made = not is_empty(partial), made_with() | ({} if device is None else {"device": device})
    if resumed:
        record = read_record(partial)
        check_same(partial, "unfinished work of another run", record, identity, type(recipe))
        remove_partial_writes(partial)
        record["made_with"] = made
    else:
        record = {
            **identity,
            "made_with": made,
            "seconds": 0.0,
            "tokens": 0,
            "peak_memory_bytes": 0,
            "measures": {},
        }
    stage = Stage(out, partial, record, complete=False, resumed=resumed)
    atomic_write(partial / RECIPE, recipes.dump(recipe))
    stage.save()
    return stage


def keep_or_remove(stage: Stage) -> None:
    """After an exception: keep the directory if it has work that can be resumed, else remove it."""
    if is_empty(stage.directory):
        shutil.rmtree(stage.directory)
    else:
        stage.save()


def complete(stage: Stage) -> None:
    """Add the report if there is none, and rename the directory to its final name."""
    stage.save()
    if not (stage.directory / REPORT).exists():
        series = {
            path.stem: stage.series(path.stem) for path in sorted((stage.directory / METRICS).glob("*.jsonl"))
        }
        stage_report(stage.record, series).write(stage.directory / REPORT)
    publish(stage.directory, stage.out)
    stage.directory = stage.out


def is_empty(partial: Path) -> bool:
    """Whether a partial directory has no work, only the files that `start_or_resume` writes."""
    return {item.name for item in partial.iterdir() if not item.name.endswith(".writing")} <= {
        RECIPE,
        LINEAGE,
    }


def remove_partial_writes(partial: Path) -> None:
    """Remove what a kill left half-written: temporary files and directories, and an incomplete last row of a
    log."""
    for path in sorted(partial.rglob(".*.writing")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (partial / METRICS).glob("*.jsonl"):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            atomic_write(path, data[:whole])


def read_record(directory: Path) -> dict[str, Any]:
    """The lineage of a directory. Raises InputError where it cannot be read."""
    try:
        record = json.loads((directory / LINEAGE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory / LINEAGE} cannot be read ({error}): delete {directory} or give another --out"
        ) from None
    if not isinstance(record, dict):
        raise InputError(
            f"{directory / LINEAGE} is not a valid lineage file: delete {directory} or give another --out"
        )
    return record


def check_same(
    directory: Path, other: str, record: dict[str, Any], identity: dict[str, Any], kind: type
) -> None:
    """Raise InputError where a stored lineage is not that of this run; the message calls the stored run
    `other`.

    kind: the dataclass of the recipe. Keys of the stored recipe that have been renamed count under their new
    names.
    """
    inputs = record.get("inputs")
    if isinstance(inputs, dict) and not all(map(covers_whole_input, inputs.values())):
        raise InputError(
            f"{directory} was made by an older version, which hashed only parts of large inputs, so a "
            "changed input would go unnoticed: "
            "give another --out, or delete it"
        )
    stored = record.get("recipe")
    if isinstance(stored, dict):
        record = {**record, "recipe": recipes.with_current_names(kind, stored)[0]}
    different = differences(record, identity)
    if different:
        raise InputError(f"{directory} has {other} ({different}): give another --out, or delete it")


def differences(record: dict[str, Any], identity: dict[str, Any]) -> str:
    """The keys that differ between a stored run and this one, at most three; empty where none does."""
    stored, wanted = flatten(record, identity.keys()), flatten(identity, identity.keys())
    names = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def flatten(table: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    """Nested tables as one table with dotted keys; the prefix "recipe." is left out."""
    result: dict[str, Any] = {}
    for key in keys:
        value = table.get(key)
        if isinstance(value, Mapping):
            prefix = "" if key == "recipe" else f"{key}."
            result.update({prefix + name: item for name, item in flatten(value, value.keys()).items()})
        else:
            result[key] = value
    return result


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes; the lock ends with the process.

    Raises InputError where it is locked.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{directory}: another process is working on it; wait for it, or give another --out"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
