"""Token stores: they read what they wrote, and name damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanohybrid.data import TokenStore
from nanohybrid.errors import InputError

DOCUMENTS = [([5, 6, 7], [0, 1, 1]), ([], []), ([9], [1])]


def test_token_store_reads_what_it_wrote(tmp_path: Path) -> None:
    TokenStore.from_documents(DOCUMENTS).write(tmp_path / "a.safetensors")
    store = TokenStore.read(tmp_path / "a.safetensors")
    assert len(store) == 3 and store.token_count == 4
    assert isinstance(store.tokens, np.memmap)
    for index, (tokens, loss) in enumerate(DOCUMENTS):
        got_tokens, got_loss = store.document(index)
        assert got_tokens.tolist() == tokens and got_loss.tolist() == loss


def test_token_store_may_be_empty(tmp_path: Path) -> None:
    TokenStore.from_documents([]).write(tmp_path / "a.safetensors")
    assert len(TokenStore.read(tmp_path / "a.safetensors")) == 0


def test_token_store_file_is_readable_by_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    TokenStore.from_documents(DOCUMENTS).write(tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    assert arrays["tokens"].tolist() == [5, 6, 7, 9] and arrays["tokens"].dtype == np.int32
    assert arrays["loss"].tolist() == [0, 1, 1, 1] and arrays["offsets"].tolist() == [0, 3, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "not safetensors", "empty", "wrong type", "deep", "huge"])
def test_token_store_names_a_damaged_file(tmp_path: Path, damage: str) -> None:
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
    with pytest.raises(InputError, match=r"a\.safetensors: damaged token store"):
        TokenStore.read(path)


def test_token_store_names_the_command_that_builds_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such token store; `nanohybrid data"):
        TokenStore.read(tmp_path / "b.safetensors")


def test_token_store_refuses_offsets_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="do not split"):
        TokenStore(np.zeros(4, np.int32), np.zeros(4, np.uint8), np.array([0, 3], np.int64))


def test_check_ids_refuses_ids_outside_the_vocabulary() -> None:
    store = TokenStore.from_documents(DOCUMENTS)
    store.check_ids(10, "a")
    TokenStore.from_documents([]).check_ids(1, "empty")
    with pytest.raises(InputError, match="a: has ids up to 9, but the model's vocabulary ends at 8"):
        store.check_ids(9, "a")
    with pytest.raises(InputError, match="b: has ids -5 to 0"):
        TokenStore.from_documents([([0, -5], [1, 1])]).check_ids(9, "b")
