"""The command line: fast help, errors in one line, and no traceback for a user's mistake."""

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
    """A command `fake` of a recipe and an input; returns what it was run with, or raises what is put into
    `raises`."""
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
def test_help_lists_the_pipeline_in_order_and_is_fast():
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
    code = "import sys; from nanohybrid.cli.main import main; main(['--help']); "
    code += f"print(set(sys.modules) & {heavy})"
    assert python("-c", code).stdout.endswith("set()\n")


def test_main_without_a_command_prints_the_help(capsys):
    assert cli.main([]) == 0 and "usage: nanohybrid" in capsys.readouterr().out


def test_version_flag_prints_the_version(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("nanohybrid 0")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("pretrian", "did you mean pretrain?"),
        ("evalute", "did you mean evaluate?"),
        ("xyzzy", "the commands are"),
    ],
)
def test_unknown_command_suggests_the_most_similar(typed, hint, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"nanohybrid: error: unknown command '{typed}': {hint}") and error.count("\n") == 1
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
def test_bad_argument_is_named_in_one_line(fake, flags, complaint, capsys):
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
def test_bad_recipe_is_refused_in_one_line_that_names_the_key(
    fake, tmp_path, text, complaint, joined, capsys
):
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


def test_help_of_a_stage_shows_the_fields_of_its_recipe(fake, capsys):
    assert cli.main(["fake", "--help"]) == 0
    text = capsys.readouterr().out
    assert "How many steps to take." in text and "--optimizer.learning-rate" in text and "--json" in text


def test_recipe_parser_refuses_fields_named_like_common_flags():
    @dataclass(frozen=True)
    class Greedy:
        out: str = "x"

    with pytest.raises(ValueError, match="out"):
        common.recipe_parser("greedy", "x", Greedy)


def test_nanohybrid_error_is_one_line_and_exit_code_2(fake, capsys):
    fake.raises = InputError("data.txt is empty:\n give another file")
    assert cli.main(["fake", "--out", "o"]) == 2
    assert capsys.readouterr().err == "nanohybrid: error: data.txt is empty: give another file\n"


def test_other_exceptions_keep_their_traceback(fake):
    fake.raises = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake", "--out", "o"])


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory",
        ),
    ],
)
def test_memory_and_disk_errors_are_one_line_and_exit_code_2(fake, refusal, line, capsys):
    fake.raises = refusal
    assert cli.main(["fake", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanohybrid: error: ") and line in error and error.count("\n") == 1


def test_unknown_nanohybrid_kernels_is_refused_before_any_work(fake, monkeypatch, capsys):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "banana")
    assert cli.main(["fake", "--out", "o"]) == 2 and fake.recipe is None
    assert (
        "NANOHYBRID_KERNELS is 'banana'; known are reference, torch, numba, triton" in capsys.readouterr().err
    )


def test_triton_without_a_gpu_is_refused_before_any_work(fake, monkeypatch, capsys):
    monkeypatch.setenv("NANOHYBRID_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["fake", "--out", "o"]) == 2 and fake.recipe is None
    assert "there is no CUDA GPU" in capsys.readouterr().err


def test_encoding_errors_of_stdin_and_stdout_give_no_traceback():
    code = "import sys; from nanohybrid.cli.main import set_encoding_errors as f; f(); "
    code += "print(ascii(sys.stdin.read()), '\u2028')"
    answer = subprocess.run(
        [sys.executable, "-c", code], input=b"a\xff", capture_output=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert answer.returncode == 0 and answer.stdout == b"'a\\udcff' \\u2028\n"


def test_ctrl_c_of_a_stage_says_that_the_same_command_resumes(fake, capsys):
    fake.raises = KeyboardInterrupt()
    assert cli.main(["fake", "--out", "o"]) == 130
    assert capsys.readouterr().err == "nanohybrid: stopped; the same command resumes\n"


@pytest.mark.parametrize(
    ("flags", "resumes"), [(["generate"], False), (["generate", "--input", "x"], True), (["pretrain"], True)]
)
def test_resumes_is_true_for_stages_and_batches_only(flags, resumes):
    assert cli.resumes(flags) == resumes


def test_broken_pipe_is_not_an_error():
    code = "import sys\nfrom nanohybrid.cli import main as m\nm.overview = lambda: 'x' * 10_000_000\n"
    code += "sys.exit(m.main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_require_names_the_pip_install_of_a_missing_extra():
    with pytest.raises(MissingExtraError, match=r"pip install 'nanohybrid\[data\]'"):
        require("no_such_package.inside", "data")


def test_print_json_is_one_line_of_plain_values(capsys):
    common.print_json(
        {"path": Path("a/b"), "recipe": Optimizer(), "set": {2, 1}, "number": numpy.float32(0.5), "text": "ä"}
    )
    line = capsys.readouterr().out
    expected = {"path": "a/b", "recipe": {"learning_rate": 0.001}, "set": [1, 2], "number": 0.5, "text": "ä"}
    assert json.loads(line) == expected and line.count("\n") == 1


def test_table_formats_numbers(capsys):
    common.table(["what", "count"], [("tokens [bold]", 1234567), ("loss", 0.123456)], title="run")
    text = capsys.readouterr().out
    assert "1,234,567" in text and "0.1235" in text and "[bold]" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_module_has_summary_parser_and_run(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.run) and module.parser().prog == f"nanohybrid {name}"
    assert (
        name == "quickstart" or cli.COMMANDS[name].summary == module.SUMMARY
    )  # its own help is about all the stages
