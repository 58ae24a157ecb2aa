"""Sources: the Python installation, user files, and problems with masked questions."""

import itertools
from pathlib import Path

import pytest

from nanohybrid import tasks
from nanohybrid.data.sources import files, problems, python_install
from nanohybrid.data.tokenize import encode
from nanohybrid.errors import InputError
from nanohybrid.text import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a small text, only so that there is a tokenizer"], 269)


def test_python_install_yields_code_and_prose_in_the_order_of_the_seed() -> None:
    code = list(itertools.islice(python_install.code(0, 3000), 20))
    prose = list(itertools.islice(python_install.prose(0, 3000), 20))
    assert {document.store for document in code} == {"code"} and {document.store for document in prose} == {
        "prose"
    }
    assert any("import " in document.text for document in code)
    assert code == list(itertools.islice(python_install.code(0, 3000), 20))
    assert code != list(itertools.islice(python_install.code(1, 3000), 20))


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_bytes(b"first \xff")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 1}\n')
    (tmp_path / "d.png").write_bytes(b"no text")
    assert list(files.texts(tmp_path)) == ["first \ufffd", "second", "third", "fourth"]
    assert [document.store for document in files.files(tmp_path / "b.md", 100)] == ["files"]


def test_files_names_a_bad_line_a_missing_path_and_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(InputError, match=r"c\.jsonl:2: not a JSON object with a \"text\""):
        list(files.texts(tmp_path))
    with pytest.raises(InputError, match="no such file or directory"):
        list(files.texts(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.txt"):
        list(files.texts(tmp_path / "empty"))


@pytest.mark.parametrize("name", tasks.names())
def test_problem_document_has_loss_on_the_solution_and_not_on_the_question(
    name: str, tokenizer: Tokenizer
) -> None:
    for problem in problems.problems(name, tasks.get(name).difficulties, 20, seed=0):
        ((tokens, loss),) = encode(tokenizer, [problems.document(problem)])
        assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
        read = tokenizer.decode([token for token, learned in zip(tokens, loss, strict=True) if not learned])
        learned = tokenizer.decode([token for token, learned in zip(tokens, loss, strict=True) if learned])
        assert read == problem.prompt + "\n"
        assert learned == f"{problem.trace}\n{problem.answer}\n"
        assert loss == sorted(loss)


def test_special_tokens_in_a_document_are_plain_characters(tokenizer: Tokenizer) -> None:
    ((tokens, _),) = encode(tokenizer, [problems.Document("prose", (problems.TextSpan("</s><SPECIAL_12>"),))])
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
    assert min(tokens[1:-1]) > 12 and tokenizer.decode(tokens) == "</s><SPECIAL_12>"
