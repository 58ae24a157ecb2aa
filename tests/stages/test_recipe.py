"""Recipes survive TOML; unknown keys and wrong types are refused by name."""

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.errors import ConfigError, InputError
from nanohybrid.stages import recipe as recipes


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    steps: int = 10
    """How many steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = field(default_factory=Optimizer)
    mixture: tuple[tuple[float, dict[str, float]], ...] = ((0.6, {"text": 1.0}),)
    teacher: str | None = None
    families: tuple[str, ...] = ()
    shuffle: bool = True


numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(string.printable, max_size=12)


@given(
    st.builds(
        Recipe,
        steps=st.integers(-(2**40), 2**40),
        precision=st.sampled_from(["fp32", "bf16"]),
        optimizer=st.builds(Optimizer, numbers, st.tuples(numbers, numbers)),
        mixture=st.lists(st.tuples(numbers, st.dictionaries(names, numbers, max_size=3)), max_size=3).map(
            tuple
        ),
        teacher=st.none()
        | st.text(string.ascii_letters + " äß'\"\\/-_", min_size=1).filter(
            lambda text: text not in ("null", "None")
        ),
        families=st.lists(st.text(string.ascii_letters + " #=[]", min_size=1), max_size=3).map(tuple),
        shuffle=st.booleans(),
    )
)
def test_recipe_survives_toml(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(recipes.dump(recipe))
    assert recipes.load(Recipe, path) == recipe


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stepz = 3", "stepz"),
        ("[optimizer]\nlr = 3", "optimizer.*lr"),
        ('steps = "many"', "steps: expected int, got many"),
        ('precision = "fp7"', r"precision: expected Literal\['fp32', 'bf16'\], got fp7"),
        ("[optimizer", "not a readable TOML recipe"),
        ("steps = 1.5", "steps"),
    ],
)
def test_recipe_load_names_the_bad_key(tmp_path, text, complaint):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"bad\.toml: .*{complaint}") as error:
        recipes.load(Recipe, path)
    assert "\n" not in str(error.value)


def test_recipe_load_names_the_type_of_an_optional_key_without_none(tmp_path):
    @dataclass(frozen=True)
    class Optional:
        limit: float | None = None

    path = tmp_path / "bad.toml"
    path.write_text('limit = "far"')
    with pytest.raises(InputError, match="limit: expected float, got far"):
        recipes.load(Optional, path)


def test_recipe_load_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        recipes.load(Recipe, tmp_path / "nowhere.toml")


def test_recipe_dump_refuses_values_that_toml_cannot_hold():
    @dataclass(frozen=True)
    class Unspeakable:
        limit: int | None = 3
        path: Path = Path("x")

    assert recipes.to_dict(Unspeakable()) == {"limit": 3, "path": "x"}
    with pytest.raises(ConfigError, match="limit is None"):
        recipes.dump(Unspeakable(limit=None))
    with pytest.raises(ConfigError, match=r"limit is a complex"):
        recipes.dump(Unspeakable(limit=1j))


@dataclass(frozen=True)
class Clipping:
    RENAMED: ClassVar[dict[str, str]] = {"clip": "max_grad_norm"}
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Training:
    RENAMED: ClassVar[dict[str, str]] = {"updates": "max_steps"}
    max_steps: int = 10
    optimizer: Clipping = field(default_factory=Clipping)
    stages: tuple[Clipping, ...] = ()
    last: Clipping | None = None


def test_recipe_load_accepts_renamed_keys_with_one_warning_each(tmp_path, capsys):
    path = tmp_path / "old.toml"
    path.write_text("updates = 3\n[optimizer]\nclip = 0.5\n[[stages]]\nclip = 2.0\n[last]\nclip = 4.0\n")
    wanted = Training(3, Clipping(0.5), (Clipping(2.0),), Clipping(4.0))
    assert recipes.load(Training, path) == wanted
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 4 and all(str(path) in line for line in warnings)
    assert any("updates is now max_steps" in line for line in warnings)
    assert any("optimizer.clip is now optimizer.max_grad_norm" in line for line in warnings)
    path.write_text(recipes.dump(wanted))
    assert recipes.load(Training, path) == wanted and capsys.readouterr().err == ""


def test_recipe_load_refuses_both_names_of_a_key(tmp_path):
    path = tmp_path / "both.toml"
    path.write_text("[optimizer]\nclip = 1.0\nmax_grad_norm = 2.0\n")
    with pytest.raises(InputError, match=r"both\.toml: has both clip and max_grad_norm"):
        recipes.load(Training, path)


def test_renamed_keys_are_dotted_and_leave_out_keys_inside_lists():
    assert recipes.renamed_keys(Training) == {
        "updates": "max_steps",
        "optimizer.clip": "optimizer.max_grad_norm",
        "last.clip": "last.max_grad_norm",
    }


@dataclass(frozen=True)
class Stage:
    steps: int = 5
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=7.0, betas=(0.5, 0.6)))


@dataclass(frozen=True)
class Entry:
    train: Stage | None = None


@dataclass(frozen=True)
class Chain:
    stages: tuple[Entry, ...] = ()
    last: Stage | None = None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[[stages]]\n[stages.train]\nsteps = 6\n", Chain((Entry(Stage(6)),))),
        (
            "[[stages]]\n[stages.train.optimizer]\nbetas = [0.1, 0.2]\n",
            Chain((Entry(Stage(5, Optimizer(7.0, (0.1, 0.2)))),)),
        ),
        ("[last]\nsteps = 6\n", Chain(last=Stage(6))),
        (
            "[last.optimizer]\nlearning_rate = 2.0\n",
            Chain(last=Stage(5, Optimizer(2.0, (0.5, 0.6)))),
        ),
    ],
)
def test_recipe_load_gives_entries_the_defaults_of_their_own_dataclass(tmp_path, text, wanted):
    """The parser takes those of the nested class: a learning rate of 1e-3 here, not 7."""
    path = tmp_path / "chain.toml"
    path.write_text(text)
    assert recipes.load(Chain, path) == wanted


def test_recipe_load_refuses_wrong_keys_in_entries(tmp_path):
    path = tmp_path / "chain.toml"
    path.write_text("[[stages]]\n[stages.train]\noptimizer = 3\n")
    with pytest.raises(InputError, match="optimizer must be a table, not 3"):
        recipes.load(Chain, path)
    path.write_text("[[stages]]\n[stages.train.optimizer]\nmomentum = 0.9\n")
    with pytest.raises(InputError, match="momentum"):
        recipes.load(Chain, path)
