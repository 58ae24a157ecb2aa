"""What is written beside and renamed is never seen half-written."""

import os

import pytest

from nanohybrid import files
from nanohybrid.errors import InputError


def test_atomic_write_replaces_a_file(tmp_path):
    target = tmp_path / "deep" / "file"
    files.atomic_write(target, "old")
    files.atomic_write(target, b"new")
    assert target.read_bytes() == b"new" and os.listdir(target.parent) == ["file"]


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    files.atomic_write(target, "old")

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.atomic_write(target, "new")
    assert target.read_text() == "old"


def test_atomic_directory_replaces_a_directory(tmp_path):
    target = tmp_path / "checkpoint"
    for content in ("old", "new"):
        with files.atomic_directory(target) as directory:
            (directory / content).mkdir()
            (directory / content / "weights").write_text(content)
            assert not (target / content).exists()
    assert [path.name for path in target.iterdir()] == ["new"] and [
        path.name for path in tmp_path.iterdir()
    ] == ["checkpoint"]


def test_atomic_directory_that_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "checkpoint"
    with files.atomic_directory(target) as directory:
        (directory / "weights").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(target) as directory:
        (directory / "weights").write_text("half")
        raise RuntimeError
    assert (target / "weights").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == [
        "checkpoint"
    ]


def test_exchange_swaps_directories_without_renameat2(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.exchange(tmp_path / "a", tmp_path / "b")
    assert (
        (tmp_path / "a" / "b").exists()
        and (tmp_path / "b" / "a").exists()
        and len(list(tmp_path.iterdir())) == 2
    )


def test_publish_refuses_to_replace_a_file(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(InputError, match="is a file"), files.atomic_directory(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "mine"
