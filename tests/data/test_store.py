"""Token stores: what is written is what is mapped, and a damaged file says so."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanohybrid.data import TokenStore
from nanohybrid.errors import InputError

DOCUMENTS = [([5, 6, 7], [0, 1, 1]), ([], []), ([9], [1])]


def test_a_store_reads_back_as_it_was_written(tmp_path: Path) -> None:
    TokenStore.from_documents(DOCUMENTS).write(tmp_path / "a.safetensors")
    store = TokenStore.read(tmp_path / "a.safetensors")
    assert len(store) == 3 and store.token_count == 4
    assert isinstance(store.tokens, np.memmap)
    for index, (tokens, loss) in enumerate(DOCUMENTS):
        got_tokens, got_loss = store.document(index)
        assert got_tokens.tolist() == tokens and got_loss.tolist() == loss


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    TokenStore.from_documents([]).write(tmp_path / "a.safetensors")
    assert len(TokenStore.read(tmp_path / "a.safetensors")) == 0


def test_the_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    TokenStore.from_documents(DOCUMENTS).write(tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    assert arrays["tokens"].tolist() == [5, 6, 7, 9] and arrays["tokens"].dtype == np.int32
    assert arrays["loss"].tolist() == [0, 1, 1, 1] and arrays["offsets"].tolist() == [0, 3, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "not safetensors", "empty", "wrong type", "deep", "huge"])
def test_a_damaged_store_is_named(tmp_path: Path, damage: str) -> None:
    path = TokenStore.from_documents(DOCUMENTS).write(tmp_path / "a.safetensors")
    data = path.read_bytes()
    broken = {
        "cut": data[:-3],
        "not safetensors": b"hello " * 20,
        "empty": b"",
        "wrong type": data.replace(b'"I32"', b'"F32"'),
    }
    broken["deep"] = (200_000).to_bytes(8, "little") + b"[" * 200_000
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["tokens"]["shape"] = [10**30]
    broken["huge"] = len(json.dumps(header)).to_bytes(8, "little") + json.dumps(header).encode() + data[-64:]
    path.write_bytes(broken[damage])
    with pytest.raises(InputError, match=r"a\.safetensors: not a whole token store"):
        TokenStore.read(path)


def test_a_missing_store_names_the_command_that_builds_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such token store; `nanohybrid data"):
        TokenStore.read(tmp_path / "b.safetensors")


def test_offsets_must_cut_the_tokens() -> None:
    with pytest.raises(InputError, match="do not cut"):
        TokenStore(np.zeros(4, np.int32), np.zeros(4, np.uint8), np.array([0, 3], np.int64))


def test_ids_that_a_vocabulary_lacks_are_told_by_name() -> None:
    store = TokenStore.from_documents(DOCUMENTS)
    store.check_ids(10, "a")
    TokenStore.from_documents([]).check_ids(1, "empty")
    with pytest.raises(InputError, match="a: holds ids up to 9, the model's end at 8"):
        store.check_ids(9, "a")
    with pytest.raises(InputError, match="b: holds ids -5 to 0"):
        TokenStore.from_documents([([0, -5], [1, 1])]).check_ids(9, "b")
