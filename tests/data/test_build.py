"""The stage `data`: from a recipe to a corpus that training reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanohybrid import tasks
from nanohybrid.cli.main import main
from nanohybrid.data.build import build
from nanohybrid.data.corpus import Corpus
from nanohybrid.data.mixture import Phase
from nanohybrid.data.recipe import DataRecipe, TaskSource
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.stages import recipe as recipes
from nanohybrid.text import Tokenizer
from nanohybrid.text.chat import ChatTemplate

SMALL = DataRecipe(
    vocab_size=300,
    code_megabytes=0.02,
    prose_megabytes=0.02,
    tasks=(TaskSource("running", 200), TaskSource("parity", 200, (4, 12))),
    near_duplicate_threshold=0,
    validation_fraction=0.1,
    phases=(Phase(0.6, {"code": 1, "prose": 1, "tasks": 2}), Phase(1.0, {"tasks-running": 1})),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SMALL, tmp_path_factory.mktemp("data") / "corpus")


def test_build_writes_tokenizer_template_and_a_corpus_that_loads(corpus: Path) -> None:
    assert Tokenizer.from_directory(corpus).vocab_size == 300
    assert ChatTemplate.from_directory(corpus).render([{"role": "user", "content": "hello"}])
    loader = Corpus.read(corpus).loader(batch_tokens=512, sequence_length=128, seed=0, total_steps=10)
    tokenizer = Tokenizer.from_directory(corpus)
    for step in range(10):
        batch = loader.batch(step)
        assert 300 <= batch.layout.tokens <= 800 and batch.layout.max_length <= 128 and batch.target_count
        assert int(batch.tokens_T.max()) < tokenizer.vocab_size


def test_build_separates_the_splits_of_problems(corpus: Path) -> None:
    tokenizer = Tokenizer.from_directory(corpus)
    for name in ("tasks-running", "tasks-parity"):
        for split, store in (
            ("train", Corpus.read(corpus).stores[name]),
            ("test", Corpus.read(corpus).validation[name]),
        ):
            prompts = [
                tokenizer.decode(store.document(index)[0].tolist()).split("\n")[0]
                for index in range(len(store))
            ]
            assert len(set(prompts)) == len(prompts) > 0
            assert {tasks.split_of(prompt) for prompt in prompts} == {split}


def test_build_statistics_equal_the_stores(corpus: Path) -> None:
    stats = json.loads((corpus / "stats.json").read_text())
    parity = stats["stores"]["tasks-parity"]
    held_out = {
        name.removeprefix("validation-"): stats["stores"].pop(name)
        for name in list(stats["stores"])
        if "validation" in name
    }
    assert parity["documents"] + sum(parity["dropped"].values()) == 200
    stores = Corpus.read(corpus).stores
    assert {name: len(store) for name, store in Corpus.read(corpus).validation.items()} == {
        name: store["documents"] for name, store in held_out.items()
    }
    assert {name: len(store) for name, store in stores.items()} == {
        name: store["documents"] for name, store in stats["stores"].items()
    }
    assert stats["tokens"] == sum(store.token_count for store in stores.values())
    assert "Dropped" in (corpus / "report.html").read_text()


def test_build_is_deterministic_and_a_complete_one_is_reused(corpus: Path, tmp_path: Path) -> None:
    again = build(SMALL, tmp_path / "again")
    for name in (
        "tokenizer.json",
        "mixture.json",
        "stats.json",
        "code.safetensors",
        "tasks-running.safetensors",
    ):
        assert (corpus / name).read_bytes() == (again / name).read_bytes(), name
    before = (corpus / "lineage.json").read_bytes()
    build(SMALL, corpus)
    assert (corpus / "lineage.json").read_bytes() == before
    with pytest.raises(InputError, match="another run"):
        build(replace(SMALL, seed=1), corpus)


def test_build_reads_user_files_with_a_given_tokenizer(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    sentences = [
        f"Sentence {word} is about nothing but {word} itself, which is little.\n"
        for word in ("one", "two", "three")
    ]
    (tmp_path / "texts" / "a.txt").write_text("".join(sentences))
    (tmp_path / "prompts.txt").write_text(
        "What is asked of the model when it is finished and can be measured by all of us?"
    )
    (tmp_path / "texts" / "b.txt").write_text("".join(sentences) + (tmp_path / "prompts.txt").read_text())
    recipe = DataRecipe(
        tokenizer=corpus,
        code_megabytes=0,
        prose_megabytes=0,
        files=(tmp_path / "texts",),
        tasks=(),
        near_duplicate_threshold=0,
        decontaminate_against=(tmp_path / "prompts.txt",),
        phases=(Phase(1.0, {"files": 1}),),
    )
    stats = json.loads((build(recipe, tmp_path / "out") / "stats.json").read_text())
    assert stats["vocab_size"] == 300
    assert stats["stores"]["files"]["documents"] == 1 and stats["stores"]["files"]["dropped"] == {
        "evaluation prompt": 1
    }


def test_data_command_builds_and_prints_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.toml").write_text(
        recipes.dump(replace(SMALL, tasks=(TaskSource("running", 50),), phases=(Phase(1.0, {"tasks": 1}),)))
    )
    arguments = [
        "data",
        "--recipe",
        str(tmp_path / "small.toml"),
        "--seed",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == str(tmp_path / "out") and result["stores"]["tasks-running"]["documents"] > 30
    assert main(arguments) == 0  # done already: only told again
    assert "tasks-running" in capsys.readouterr().out


def test_tiny_data_recipe_equals_the_defaults() -> None:
    path = Path(recipes.__file__).parents[1] / "recipes" / "tiny" / "data.toml"
    assert recipes.load(DataRecipe, path) == DataRecipe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"near_duplicate_threshold": 2.0}, "between 0 and 1"),
        ({"validation_fraction": 0.9}, "between 0 and 0.5"),
        ({"code_megabytes": -1.0}, "must not be negative"),
        ({"section_characters": 0}, "at least one character"),
        ({"tasks": (TaskSource("sums"), TaskSource("sums"))}, "named twice"),
        ({"tasks": (TaskSource("sums", 10, (99,)),)}, "difficulties 3 to 6, not 99"),
        ({"tasks": ()}, "names tasks, which is not among the stores"),
        ({"vocab_size": 100_000}, "the text yields only"),
        ({"phases": (Phase(0.5, {"tasks": 1}),)}, "the last must be 1.0"),
    ],
)
def test_build_refuses_bad_recipes_and_leaves_nothing_behind(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(replace(SMALL, **changes), tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_corpus_read_names_a_directory_that_is_not_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "mixture.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="not a corpus"):
        Corpus.read(tmp_path)


def test_build_notices_a_changed_chat_template_of_the_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """The corpus copies the template of `--tokenizer`, so another template is another run."""
    given = tmp_path / "tokenizer"
    given.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (given / name).write_bytes((corpus / name).read_bytes())
    phases = (Phase(1.0, {"tasks": 1}),)
    tasks_only = replace(
        SMALL, code_megabytes=0, prose_megabytes=0, tasks=(TaskSource("running", 20),), phases=phases
    )
    recipe = replace(tasks_only, tokenizer=given)
    build(recipe, tmp_path / "out")
    (given / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match=r"another run \(inputs\.tokenizer\.chat_template\.jinja\)"):
        build(recipe, tmp_path / "out")
