"""Whether plain text begins with BOS: as the files of the checkpoint say, and Nemotron's `<s>` always."""

import json

import pytest

from nanohybrid.text import Tokenizer, train_bpe


@pytest.fixture
def directory(tmp_path):
    """A tokenizer whose BOS is `<|begin|>`, and no setting of it."""
    train_bpe(["some text of words"] * 4, 300).save(tmp_path)
    raw = (tmp_path / "tokenizer.json").read_text().replace('"<s>"', '"<|begin|>"')
    (tmp_path / "tokenizer.json").write_text(raw)
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "vocab_size": 300}')
    (tmp_path / "tokenizer_config.json").unlink()
    return tmp_path


def add_post_processor(directory):
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    bos, text = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [1], "tokens": ["<|begin|>"]}},
    }  # fmt: skip
    path.write_text(json.dumps(raw))


def test_bos_of_another_model_is_added_where_its_files_say_so(directory):
    assert not Tokenizer.from_directory(directory).adds_bos
    add_post_processor(directory)
    assert Tokenizer.from_directory(directory).adds_bos
    for said in (False, True):
        (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": said}))
        assert Tokenizer.from_directory(directory).adds_bos is said


def test_nemotrons_bos_is_added(tmp_path):
    train_bpe(["some text of words"] * 4, 300).save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).adds_bos
