"""A stage is a function of files: a recipe and inputs in, one directory out, which appears whole or not at all.

While it works, everything lies in OUT.partial; a clean exit renames that to OUT. So a kill at any moment leaves either
nothing under the name OUT, or all of it; and the same command finds OUT.partial and goes on from what it stored.
OUT holds the stage's result beside `recipe.toml`, `lineage.json`, `metrics/*.jsonl` and `report.html`.
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
    """The work of one stage: where to write, what was done before, what to remember. Made by `open_stage`."""

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
        """Remember results (numbers, lists, tables) under "measures" in lineage.json."""
        self.record["measures"].update(values)
        self.save()

    @property
    def measures(self) -> dict[str, Any]:
        """What was measured so far; of a complete stage, everything."""
        return dict(self.record["measures"])

    def spend(self, *, tokens: int) -> None:
        """Count tokens worked on; those done again after a kill count again, since they were spent again."""
        self.record["tokens"] += tokens
        self.save_now_and_then()

    def log(self, series: str, **values: Any) -> None:
        """Append a row to metrics/SERIES.jsonl."""
        path = self.series_path(series)
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(to_json(values) + "\n")
        self.save_now_and_then()

    def series(self, name: str) -> list[dict[str, Any]]:
        """The rows logged so far, those of an interrupted run included."""
        path = self.series_path(name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rewind(self, name: str, **bound: float) -> None:
        """Drop the rows at or past a bound (`step=100`): a run that resumes at step 100 logs them again."""
        kept = [row for row in self.series(name) if all(row[key] < limit for key, limit in bound.items())]
        if self.series_path(name).exists():
            atomic_write(self.series_path(name), "".join(to_json(row) + "\n" for row in kept))

    def series_path(self, name: str) -> Path:
        """The file of a series."""
        return self.directory / METRICS / f"{name}.jsonl"

    def save_now_and_then(self) -> None:
        """Write lineage.json if that was not done lately, so that a kill loses seconds of the account and no more."""
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Bring time and memory up to date and write lineage.json."""
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
    """Open the output directory `out` of the stage `name`, to be filled by the body of the `with`.

    Where OUT already holds this very recipe, inputs and seed, `stage.complete` is true and the body must return at once;
    where it holds anything else, InputError. Where OUT.partial holds unfinished work of the same, `stage.resumed` is true.
    device: where the body computes, which is noted beside the machine and makes no difference to what the run is.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"the seed is {seed}: give a number from 0 to 2^63 - 1")
    out = Path(os.path.abspath(out))
    identity = identify(name, recipe, inputs or {}, seed)
    if find_complete(out, identity, type(recipe)):
        yield Stage(out, out, read_record(out), complete=True, resumed=False)
        return
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial):
        stage = begin(out, partial, identity, recipe, device)
        try:
            yield stage
        except BaseException:
            leave(stage)
            raise
        finish(stage)


def identify(name: str, recipe: Any, inputs: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """What makes two runs the same run."""
    hashes = {key: fingerprint(Path(path)) for key, path in inputs.items()}
    identity = {"stage": name, "seed": seed, "inputs": hashes, "recipe": recipes.to_dict(recipe)}
    return json.loads(to_json(identity))


def find_complete(out: Path, identity: dict[str, Any], kind: type) -> bool:
    """Whether `out` holds the complete output of this run. Raises InputError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / LINEAGE).is_file():
        raise InputError(f"{out} exists and is no stage's output: give another --out")
    check_same(out, "another run", read_record(out), identity, kind)
    return True


def begin(out: Path, partial: Path, identity: dict[str, Any], recipe: Any, device: str | None) -> Stage:
    """Take up what an interrupted run of the same recipe left in `partial`, or start there from nothing."""
    resumed, made = not untouched(partial), made_with() | ({} if device is None else {"device": device})
    if resumed:
        record = read_record(partial)
        check_same(partial, "unfinished work of another run", record, identity, type(recipe))
        clear_up(partial)
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


def leave(stage: Stage) -> None:
    """After an exception: keep what can be resumed; keep nothing where nothing was done."""
    if untouched(stage.directory):
        shutil.rmtree(stage.directory)
    else:
        stage.save()


def finish(stage: Stage) -> None:
    """Complete the directory and give it its name."""
    stage.save()
    if not (stage.directory / REPORT).exists():
        series = {
            path.stem: stage.series(path.stem) for path in sorted((stage.directory / METRICS).glob("*.jsonl"))
        }
        stage_report(stage.record, series).write(stage.directory / REPORT)
    publish(stage.directory, stage.out)
    stage.directory = stage.out


def untouched(partial: Path) -> bool:
    """Whether a partial directory holds no work: only what `begin` itself writes."""
    return {item.name for item in partial.iterdir() if not item.name.endswith(".writing")} <= {
        RECIPE,
        LINEAGE,
    }


def clear_up(partial: Path) -> None:
    """Remove what a kill cut in half: half-written files and directories, a last metrics row without its end."""
    for path in sorted(partial.rglob(".*.writing")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (partial / METRICS).glob("*.jsonl"):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            atomic_write(path, data[:whole])


def read_record(directory: Path) -> dict[str, Any]:
    """The lineage of a directory."""
    try:
        record = json.loads((directory / LINEAGE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory / LINEAGE} cannot be read ({error}): delete {directory} or give another --out"
        ) from None
    if not isinstance(record, dict):
        raise InputError(f"{directory / LINEAGE} is not a lineage: delete {directory} or give another --out")
    return record


def check_same(
    directory: Path, other: str, record: dict[str, Any], identity: dict[str, Any], kind: type
) -> None:
    """Raise InputError where a directory's lineage is not that of this run; `other` says what the directory then holds.

    kind: the dataclass of the recipe. Keys of the stored recipe that were renamed since count under their new names.
    """
    inputs = record.get("inputs")
    if isinstance(inputs, dict) and not all(map(covers_whole_input, inputs.values())):
        raise InputError(
            f"{directory} was made by an older version, which read only parts of large inputs, so that a changed input cannot be told: "
            "give another --out, or delete it"
        )
    stored = record.get("recipe")
    if isinstance(stored, dict):
        record = {**record, "recipe": recipes.with_current_names(kind, stored)[0]}
    different = differences(record, identity)
    if different:
        raise InputError(f"{directory} holds {other} ({different}): give another --out, or delete it")


def differences(record: dict[str, Any], identity: dict[str, Any]) -> str:
    """The names of what differs between a stored run and this one, the first few; empty where nothing does."""
    stored, wanted = flatten(record, identity.keys()), flatten(identity, identity.keys())
    names = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def flatten(table: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    """Nested tables as one, with dotted names without the leading "recipe."."""
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
    """Hold a directory against a second process of the same command; a kill releases it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{directory}: another process is working on it: wait for it, or give another --out"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
