"""The command `nanohybrid tokenizer`: its files and output."""

import io
import json

import pytest

from nanohybrid.cli import tokenizer as command
from nanohybrid.errors import InputError
from nanohybrid.text import ChatTemplate, Tokenizer


def call(*arguments: object) -> int | None:
    return command.run(command.parser().parse_args([str(one) for one in arguments]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    (directory / "a.txt").write_text("tea for two, two for tea\n" * 20, encoding="utf-8")
    call("train", "--input", directory / "a.txt", "--vocab-size", 275, "--out", directory / "out")
    return directory / "out"


def test_tokenizer_train_writes_a_tokenizer_and_a_template(trained, capsys):
    assert Tokenizer.from_directory(trained).vocab_size == 275
    assert ChatTemplate.from_directory(trained).source == ChatTemplate.default().source


def test_tokenizer_train_reports_a_smaller_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab ab", encoding="utf-8")
    call("train", "--input", tmp_path / "a.txt", "--vocab-size", 5000, "--out", tmp_path / "out", "--json")
    out = capsys.readouterr()
    result = json.loads(out.out)
    assert result["vocab_size"] == Tokenizer.from_directory(tmp_path / "out").vocab_size < 5000
    assert f"only {result['vocab_size']} of 5000 ids" in out.err


def test_tokenizer_encode_and_decode_print_ids_and_text(trained, capsys, monkeypatch):
    tokenizer = Tokenizer.from_directory(trained)
    call("encode", trained, "--text", "tea<SPECIAL_12>")
    assert [int(one) for one in capsys.readouterr().out.split()] == tokenizer.encode("tea<SPECIAL_12>")
    monkeypatch.setattr("sys.stdin", io.StringIO("té\n"))
    call("encode", trained / "tokenizer.json", "--text", "-", "--bos", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["ids"] == tokenizer.encode("té\n", bos=True)
    assert result["count"] == len(result["tokens"]) == len(result["ids"])
    call("decode", trained, "--ids", *tokenizer.encode("tea"), 12, "--json")
    assert json.loads(capsys.readouterr().out) == {
        "text": "tea<SPECIAL_12>",
        "count": len(tokenizer.encode("tea")) + 1,
    }
    call("decode", trained, "--ids", 12, *tokenizer.encode("two"), "--plain")
    assert capsys.readouterr().out == "two\n"


@pytest.mark.parametrize(
    ("name", "content", "says"), [("none.txt", None, "no such file"), ("bad.txt", b"\xff\xfe\x00", "UTF-8")]
)
def test_tokenizer_train_names_an_unreadable_input(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
        call("train", "--input", tmp_path / name, "--vocab-size", 300, "--out", tmp_path / "out")


def test_tokenizer_tekken_writes_the_official_vocabulary(tmp_path, capsys):
    pytest.importorskip("mistral_common")
    call("tekken", "--out", tmp_path, "--json")
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 131_072
    assert (tmp_path / "tokenizer.json").is_file()
