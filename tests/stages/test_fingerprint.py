"""An input's fingerprint covers every byte of it, and remembering hashes never hides a change."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from nanohybrid.errors import InputError
from nanohybrid.stages import fingerprint as module
from nanohybrid.stages import hash_cache, open_stage
from nanohybrid.stages.fingerprint import fingerprint
from nanohybrid.stages.hash_cache import HashCache

SIZE = 3 << 20


@dataclass(frozen=True)
class Recipe:
    steps: int = 3


@pytest.fixture
def cache(tmp_path):
    return HashCache(tmp_path / "cache" / "sha256.json")


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read, in order."""
    names, sha256 = [], module._sha256
    monkeypatch.setattr(
        module, "_sha256", lambda file, *rest: (names.append(file.name), sha256(file, *rest))[1]
    )
    return names


def large_file(path, middle=0, age=60):
    """A file of 3 MiB that differs from others in its middle byte only, last changed `age` seconds ago."""
    content = bytearray(SIZE)
    content[SIZE // 2] = middle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    stamp(path, age)
    return path


def stamp(path, age):
    os.utime(path, ns=(0, time.time_ns() - round(age * 1e9)))


@pytest.fixture
def settled(monkeypatch):
    """Files count as unchanged for long. The change time, which no program can set, is left out."""
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", -1.0)


def test_fingerprint_differs_for_checkpoints_that_differ_in_the_middle(tmp_path, cache):
    first, second = (
        large_file(tmp_path / name / "model.safetensors", middle).parent
        for name, middle in (("a", 1), ("b", 2))
    )
    assert fingerprint(first, cache) != fingerprint(second, cache)
    assert fingerprint(first / "model.safetensors", cache) != fingerprint(second / "model.safetensors", cache)


def test_fingerprint_of_a_stage_directory_covers_more_than_its_lineage(tmp_path, cache):
    """A copied stage directory whose weights are replaced still has the first one's lineage.json."""
    for name, middle in (("a", 1), ("b", 2)):
        large_file(tmp_path / name / "model.safetensors", middle)
        (tmp_path / name / "lineage.json").write_text("{}")
    assert fingerprint(tmp_path / "a", cache) != fingerprint(tmp_path / "b", cache)


def test_fingerprint_ignores_place_and_times_and_sees_names(tmp_path, cache):
    first, second = (
        large_file(tmp_path / name / "model.safetensors", 1, age).parent
        for name, age in (("a", 60), ("b", 600))
    )
    assert fingerprint(first, cache) == fingerprint(second, cache)
    (second / "model.safetensors").rename(second / "other.safetensors")
    assert fingerprint(first, cache) != fingerprint(second, cache)


def test_open_stage_notices_an_input_that_differs_in_the_middle(tmp_path):
    model = large_file(tmp_path / "model" / "model.safetensors", 1)
    with open_stage(tmp_path / "out", "demo", Recipe(), {"model": model.parent}):
        pass
    large_file(model, 2)
    with pytest.raises(InputError, match=r"another run \(inputs\.model\)"):
        with open_stage(tmp_path / "out", "demo", Recipe(), {"model": model.parent}):
            pass


@pytest.mark.parametrize("complete", [True, False])
def test_open_stage_refuses_the_lineage_of_an_older_version(tmp_path, complete):
    model = large_file(tmp_path / "model.safetensors")
    with (
        pytest.raises(KeyboardInterrupt)
        if not complete
        else open_stage(tmp_path / "out", "demo", Recipe(), {"model": model})
    ):
        if not complete:
            with open_stage(tmp_path / "out", "demo", Recipe(), {"model": model}) as stage:
                (stage.directory / "half").write_text("work")
                raise KeyboardInterrupt
    lineage = tmp_path / ("out" if complete else "out.partial") / "lineage.json"
    record = json.loads(lineage.read_text())
    assert record["inputs"]["model"].startswith("sha256:")
    record["inputs"]["model"] = "0" * 64
    lineage.write_text(json.dumps(record))
    with pytest.raises(InputError, match="older version, which hashed only parts of large inputs"):
        with open_stage(tmp_path / "out", "demo", Recipe(), {"model": model}):
            pass


def test_fingerprint_hashes_a_large_file_once_for_all_processes(tmp_path, cache, hashed, settled):
    file = large_file(tmp_path / "model.safetensors")
    first = fingerprint(file, cache)
    assert fingerprint(file, HashCache(cache.file)) == first and hashed == ["model.safetensors"]


def test_fingerprint_does_not_cache_small_files(tmp_path, cache, hashed, settled):
    (tmp_path / "config.json").write_text("{}")
    fingerprint(tmp_path / "config.json", cache)
    fingerprint(tmp_path / "config.json", cache)
    assert len(hashed) == 2 and not cache.file.exists()


def test_fingerprint_notices_a_change_that_keeps_size_and_modification_time(tmp_path, cache, settled):
    """As `tar` and `cp -p` leave it: the change time still tells."""
    file = large_file(tmp_path / "model.safetensors", 1)
    first, before = fingerprint(file, cache), file.stat()
    time.sleep(0.05)  # more than a tick of the file system's clock
    large_file(file, 2)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert fingerprint(file, cache) != first


def test_fingerprint_notices_another_file_at_the_same_path(tmp_path, cache, settled):
    file, other = large_file(tmp_path / "a", 1), large_file(tmp_path / "b", 2)
    first = fingerprint(file, cache)
    other.replace(file)
    assert fingerprint(file, cache) != first


def test_fingerprint_does_not_cache_a_file_that_changed_just_before(tmp_path, cache, hashed):
    """A second change within the same tick of the clock would leave size and times as they are."""
    file = large_file(tmp_path / "model.safetensors", age=0)
    fingerprint(file, cache)
    fingerprint(file, cache)
    assert len(hashed) == 2 and not cache.file.exists()


def test_fingerprint_refuses_a_file_that_changes_while_it_is_read(tmp_path, cache, monkeypatch):
    file = large_file(tmp_path / "model.safetensors")
    clock = time.time
    monkeypatch.setattr(
        module.time, "time", lambda: (stamp(file, 5), clock())[1]
    )  # asked when reading begins
    with pytest.raises(InputError, match=r"model\.safetensors: changed while it was read"):
        fingerprint(file, cache)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"a": 1}', '{"a": [[1], "00"]}', '{"a": [[1, 2, 3, 4, 5], "zz"]}', "\x00\xff"],
    ids=["empty", "list", "cut", "number", "short", "no-hex", "binary"],
)
def test_hash_cache_ignores_and_replaces_a_damaged_file(tmp_path, cache, settled, content):
    cache.file.parent.mkdir()
    cache.file.write_text(content)
    file = large_file(tmp_path / "model.safetensors")
    assert fingerprint(file, HashCache(cache.file)) == fingerprint(file, HashCache(None))
    assert list(json.loads(cache.file.read_text())) == [str(file)]


def test_hash_cache_without_write_permission_is_no_error(tmp_path, settled):
    (tmp_path / "file").write_text("")
    assert fingerprint(
        large_file(tmp_path / "model"), HashCache(tmp_path / "file" / "sha256.json")
    ).startswith("sha256:")


def test_hash_cache_drops_the_oldest_entries_beyond_its_limit(tmp_path, cache, settled, monkeypatch):
    monkeypatch.setattr(hash_cache, "MAX_ENTRIES", 3)
    for number in range(5):
        fingerprint(large_file(tmp_path / str(number)), cache)
    assert list(json.loads(cache.file.read_text())) == [str(tmp_path / str(number)) for number in (2, 3, 4)]


WORKER = """
import sys
from pathlib import Path
from nanohybrid.stages import hash_cache
hash_cache.SETTLED_SECONDS = -1.0
cache = hash_cache.HashCache(Path(sys.argv[1]))
for number in range(100):
    file = Path(sys.argv[2]) / str(number)
    file.write_text("x")
    cache.add(file, hash_cache.Identity.of(file), "00" * 32, 2e9)
    cache.save()
"""


def test_hash_cache_stays_valid_when_processes_write_at_once(tmp_path, cache):
    places = [tmp_path / str(number) for number in range(3)]
    for place in places:
        place.mkdir()
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, cache.file, place]) for place in places]
    while any(worker.poll() is None for worker in workers):
        if cache.file.exists():
            json.loads(cache.file.read_text())
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(json.loads(cache.file.read_text())) >= 100  # the last one to save has all of its own
    assert [path.name for path in cache.file.parent.iterdir()] == ["sha256.json"]


def test_fingerprint_of_a_large_input_shows_progress_on_stderr(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(module, "SHOWN_BYTES", SIZE)
    monkeypatch.setattr(sys.modules["nanohybrid.stages.progress"], "PLAIN_SECONDS", 0.0)
    fingerprint(large_file(tmp_path / "model.safetensors"), cache)
    captured = capsys.readouterr()
    assert "hash model.safetensors" in captured.err and captured.out == ""
