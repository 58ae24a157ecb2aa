"""The command answers at once, says what is wrong in one line, and never shows a traceback for a user's mistake."""

import importlib
import json
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy
import pytest

from nanohybrid.cli import common
from nanohybrid.cli import main as cli
from nanohybrid.errors import InputError, MissingExtraError
from nanohybrid.extras import require


@dataclass(frozen=True)
class Optimizer:
    """Optimizer."""

    learning_rate: float = 1e-3
    """The peak of the schedule."""


@dataclass(frozen=True)
class Recipe:
    """Recipe."""

    steps: int = 10
    """How many steps to take."""
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = field(default_factory=Optimizer)
    name: str | None = None


@pytest.fixture
def fake(monkeypatch):
    """A command `fake` of a recipe and an input; returns what it was run with, or raises what is put into `raises`."""
    ran = types.SimpleNamespace(raises=None, recipe=None, arguments=None)

    def parser():
        result = common.recipe_parser("fake", "Make nothing of something.", Recipe)
        result.add_argument("--data", type=Path)
        return result

    def run(arguments):
        ran.arguments, ran.recipe = arguments, common.recipe_from(Recipe, arguments)
        if ran.raises is not None:
            raise ran.raises

    monkeypatch.setitem(
        sys.modules, "fake_command", types.SimpleNamespace(SUMMARY="fake", parser=parser, run=run)
    )
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command", "make nothing"))
    return ran


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


@pytest.mark.alone
def test_help_reads_like_the_pipeline_and_comes_at_once():
    begin = time.perf_counter()
    answer = python("-m", "nanohybrid", "--help")
    seconds = time.perf_counter() - begin
    assert answer.returncode == 0 and seconds < 1.5
    places = [
        answer.stdout.index(f"\n  {name} ")
        for name in ("data", "pretrain", "align", "compress", "evaluate", "generate", "verify")
    ]
    assert places == sorted(places)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'jsonargparse', 'rich'}"
    code = f"import sys; from nanohybrid.cli.main import main; main(['--help']); print(set(sys.modules) & {heavy})"
    assert python("-c", code).stdout.endswith("set()\n")


def test_no_command_shows_the_help_too(capsys):
    assert cli.main([]) == 0 and "usage: nanohybrid" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("nanohybrid 0")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("pretrian", "did you mean pretrain?"),
        ("evalute", "did you mean evaluate?"),
        ("xyzzy", "the commands are"),
    ],
)
def test_an_unknown_command_suggests_the_nearest(typed, hint, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"nanohybrid: error: there is no command '{typed}': {hint}")
        and error.count("\n") == 1
    )


def test_flags_override_the_recipe_and_the_recipe_its_defaults(fake, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('steps = 7\nprecision = "bf16"\n[optimizer]\nlearning_rate = 1e-4\n')
    assert (
        cli.main(
            [
                "fake",
                "--out",
                "o",
                "--data",
                "d",
                "--recipe",
                str(path),
                "--steps",
                "9",
                "--optimizer.learning_rate=0.5",
            ]
        )
        == 0
    )
    assert (
        fake.recipe == Recipe(9, "bf16", Optimizer(0.5))
        and fake.arguments.out == Path("o")
        and fake.arguments.data == Path("d")
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--steps", "many"], "fake: steps: expected int, got many"),
        (["--precision", "fp7"], "fake: precision: expected Literal['fp32', 'bf16'], got fp7"),
        (["--stepz", "3"], "--stepz"),
        (["--optimizer.lr", "3"], "lr"),
        (["--recipe", "nowhere.toml"], "nowhere.toml: not a readable TOML recipe: No such file"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(fake, flags, complaint, capsys):
    assert cli.main(["fake", "--out", "o", *flags]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("nanohybrid: error: ")
        and complaint in error
        and error.count("\n") == 1
        and fake.recipe is None
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("stepz = 3", "stepz"), ("[optimizer]\nlr = 1", "lr"), ("[x", "r.toml: not a readable TOML recipe")],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_wrong_recipe_is_one_line_that_names_the_key(fake, tmp_path, text, complaint, joined, capsys):
    path = tmp_path / "r.toml"
    path.write_text(text)
    assert (
        cli.main(["fake", "--out", "o", *([f"--recipe={path}"] if joined else ["--recipe", str(path)])]) == 2
    )
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_out_is_required_unless_a_default_is_given(fake, capsys):
    assert cli.main(["fake"]) == 2 and "out" in capsys.readouterr().err
    parser = common.recipe_parser("fake", "x", Recipe, out="runs/fake")
    assert parser.parse_args([]).out == Path("runs/fake")


def test_a_command_s_help_shows_its_fields(fake, capsys):
    assert cli.main(["fake", "--help"]) == 0
    text = capsys.readouterr().out
    assert "How many steps to take." in text and "--optimizer.learning-rate" in text and "--json" in text


def test_a_recipe_may_not_shadow_the_flags_of_every_stage():
    @dataclass(frozen=True)
    class Greedy:
        out: str = "x"

    with pytest.raises(ValueError, match="out"):
        common.recipe_parser("greedy", "x", Greedy)


def test_what_a_user_can_mend_is_one_line_and_exit_2(fake, capsys):
    fake.raises = InputError("data.txt is empty:\n give another file")
    assert cli.main(["fake", "--out", "o"]) == 2
    assert capsys.readouterr().err == "nanohybrid: error: data.txt is empty: give another file\n"


def test_a_bug_keeps_its_traceback(fake):
    fake.raises = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake", "--out", "o"])


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "the memory does not hold this"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "the memory does not hold this",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_exit_2(fake, refusal, line, capsys):
    fake.raises = refusal
    assert cli.main(["fake", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanohybrid: error: ") and line in error and error.count("\n") == 1


def test_a_form_of_the_ops_that_does_not_exist_is_refused_before_any_work(fake, monkeypatch, capsys):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "banana")
    assert cli.main(["fake", "--out", "o"]) == 2 and fake.recipe is None
    assert (
        "NANOHYBRID_KERNELS is 'banana': known are reference, torch, numba, triton" in capsys.readouterr().err
    )


def test_triton_on_a_machine_without_a_gpu_is_refused_before_any_work(fake, monkeypatch, capsys):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["fake", "--out", "o"]) == 2 and fake.recipe is None
    assert "there is no CUDA GPU" in capsys.readouterr().err


def test_bytes_that_are_no_text_and_text_that_the_terminal_lacks_are_no_traceback():
    code = "import sys; from nanohybrid.cli.main import forgive_encodings as f; f(); print(ascii(sys.stdin.read()), '\u2028')"
    answer = subprocess.run(
        [sys.executable, "-c", code], input=b"a\xff", capture_output=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert answer.returncode == 0 and answer.stdout == b"'a\\udcff' \\u2028\n"


def test_ctrl_c_says_that_the_same_command_resumes(fake, capsys):
    fake.raises = KeyboardInterrupt()
    assert cli.main(["fake", "--out", "o"]) == 130
    assert capsys.readouterr().err == "nanohybrid: stopped; the same command resumes\n"


@pytest.mark.parametrize(
    ("flags", "resumes"), [(["generate"], False), (["generate", "--input", "x"], True), (["pretrain"], True)]
)
def test_only_what_resumes_is_said_to_resume(flags, resumes):
    assert cli.resumes(flags) == resumes


def test_a_reader_that_goes_away_is_not_an_error():
    code = "import sys\nfrom nanohybrid.cli import main as m\nm.overview = lambda: 'x' * 10_000_000\nsys.exit(m.main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_a_missing_extra_names_the_install():
    with pytest.raises(MissingExtraError, match=r"pip install 'nanohybrid\[data\]'"):
        require("no_such_package.inside", "data")


def test_json_is_one_line_of_plain_values(capsys):
    common.print_json(
        {"path": Path("a/b"), "recipe": Optimizer(), "set": {2, 1}, "number": numpy.float32(0.5), "text": "ä"}
    )
    line = capsys.readouterr().out
    expected = {"path": "a/b", "recipe": {"learning_rate": 0.001}, "set": [1, 2], "number": 0.5, "text": "ä"}
    assert json.loads(line) == expected and line.count("\n") == 1


def test_a_table_shows_numbers_for_people(capsys):
    common.table(["what", "count"], [("tokens [bold]", 1234567), ("loss", 0.123456)], title="run")
    text = capsys.readouterr().out
    assert "1,234,567" in text and "0.1235" in text and "[bold]" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.run) and module.parser().prog == f"nanohybrid {name}"
    assert (
        name == "quickstart" or cli.COMMANDS[name].summary == module.SUMMARY
    )  # its own help is about all the stages
