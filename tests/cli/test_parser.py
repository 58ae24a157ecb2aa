"""The parser of the commands: kebab-case, snake_case and renamed flags; help text without type noise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonargparse
import pytest

from nanohybrid.align import GrpoRecipe, MergeRecipe, SftRecipe
from nanohybrid.cli import bench
from nanohybrid.cli.common import command_parser, recipe_from, recipe_parser
from nanohybrid.cli.main import COMMANDS, main
from nanohybrid.cli.parser import default_text, kebab_case
from nanohybrid.compress.stage import CompressRecipe
from nanohybrid.data.recipe import DataRecipe
from nanohybrid.distill.stage import DistillRecipe
from nanohybrid.errors import InputError
from nanohybrid.evaluate import EvaluateRecipe
from nanohybrid.stages.recipe import renamed_keys
from nanohybrid.train import PretrainRecipe


@dataclass(frozen=True)
class Optimizer:
    """The optimizer."""

    RENAMED: ClassVar[dict[str, str]] = {"clip": "max_grad_norm"}
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass(frozen=True)
class Recipe:
    """The recipe."""

    RENAMED: ClassVar[dict[str, str]] = {"group_size": "num_generations"}
    num_generations: int = 8
    """Completions of a prompt."""
    batch_tokens: int = 2048
    model: str | dict[str, Any] = "tiny"
    mode: Literal["fp32", "bf16"] = "bf16"
    scale_rewards: bool = True
    tasks: tuple[str, ...] = ("sums", "parity")
    optimizer: Optimizer = field(default_factory=Optimizer)


def parser() -> jsonargparse.ArgumentParser:
    result = recipe_parser("fake", "Make nothing.", Recipe)
    result.add_argument("--data", type=Path, metavar="DIR", help="documents")
    result.add_argument("--max-num-seqs", type=int, default=4, help="sequences at once")
    result.renamed({"--max-running": "--max-num-seqs"})
    return result


def parsed(*arguments: str) -> jsonargparse.Namespace:
    made = parser()
    return made.instantiate(made.parse_args(["--out", "o", *arguments]))


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-tokens", "7", "--optimizer.max-grad-norm=2"],
        ["--batch_tokens=7", "--optimizer.max_grad_norm", "2"],
        ["--batch_tokens", "7", "--optimizer", '{"max_grad_norm": 2.0}'],
    ],
)
def test_parser_accepts_kebab_and_snake_case_without_a_warning(flags, capsys):
    recipe = recipe_from(Recipe, parsed(*flags))
    assert (recipe.batch_tokens, recipe.optimizer) == (7, Optimizer(2.0))
    assert capsys.readouterr().err == ""


def test_parser_leaves_keys_of_a_dictionary_as_they_are():
    assert parsed("--model.hidden_size", "64").model == {"hidden_size": 64}


@pytest.mark.parametrize("old", ["--group-size", "--group_size"])
@pytest.mark.parametrize("joined", [True, False])
def test_parser_accepts_renamed_flags_with_one_warning_each(old, joined, capsys):
    clip = ["--optimizer.clip=3"] if joined else ["--optimizer.clip", "3"]
    arguments = parsed(old, "4", *clip, "--max-running", "9")
    recipe = recipe_from(Recipe, arguments)
    assert (recipe.num_generations, recipe.optimizer, arguments.max_num_seqs) == (4, Optimizer(3.0), 9)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(line.startswith("nanohybrid: warning: ") for line in warnings)
    assert f"{old} is now --num-generations" in warnings[0]
    assert "--optimizer.clip is now --optimizer.max-grad-norm" in warnings[1]


@pytest.mark.parametrize("joined", [True, False])
def test_parser_accepts_a_recipe_file_with_renamed_keys(tmp_path, joined, capsys):
    path = tmp_path / "old.toml"
    path.write_text(f"group_size = 4\nbatch_tokens = 5\ntasks = {['sums'] * 2000}\n[optimizer]\nclip = 3.0\n")
    flags = [f"--recipe={path}"] if joined else ["--recipe", str(path)]
    recipe = recipe_from(Recipe, parsed(*flags, "--batch-tokens", "6"))
    assert recipe == Recipe(4, 6, tasks=("sums",) * 2000, optimizer=Optimizer(3.0))
    assert len(capsys.readouterr().err.splitlines()) == 2
    path.write_text("group_size = 4\nnum_generations = 5\n")
    with pytest.raises(InputError, match=r"old\.toml: .*both group_size and num_generations"):
        parsed(*flags)


def test_parser_leaves_flags_of_a_subcommand_to_it(capsys):
    top = command_parser("top", "Two commands.")
    top.renamed({"--max-running": "--json"})
    top.add_subcommands(dest="which").add_subcommand("fake", parser())
    arguments = top.parse_args(["fake", "--out", "o", "--max-running", "9"])
    assert arguments.fake.max_num_seqs == 9
    assert "--max-running is now --max-num-seqs" in capsys.readouterr().err


def test_help_shows_kebab_case_placeholders_and_defaults_and_no_old_names():
    text = parser().format_help()
    assert "--num-generations N" in text and "--optimizer.max-grad-norm X" in text
    assert "[options] --out DIR" in text and '(default: ["sums", "parity"])' in text
    for noise in ("_tokens", "<class", "null", "group", "clip", "max-running", "type:"):
        assert noise not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_no_snake_case_flag_and_no_type_noise(command, capsys):
    from nanohybrid.cli.main import main

    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    flags = [word for word in text.split() if word.startswith(("--", "[--"))]
    assert flags and not [flag for flag in flags if "_" in flag]
    assert "<class" not in text and "default: null" not in text and "type:" not in text


@pytest.mark.parametrize(
    ("default", "text"),
    [
        (None, ""),
        (False, "false"),
        (True, "true"),
        (3, "3"),
        (0.5, "0.5"),
        ((), ""),
        (("a", "b"), '["a", "b"]'),
    ],
)
def test_default_text_is_what_a_user_would_type(default, text):
    assert default_text(default) == text


def test_old_subcommand_name_runs_the_renamed_one_with_a_warning(capsys):
    ((old, new),) = bench.RENAMED.items()
    flags = ["--roofline", "a10g", "--workloads", "8k/16k", "--quantized", "none"]
    assert main(["bench", new, *flags]) == 0
    by_new_name = capsys.readouterr()
    assert main(["bench", old, *flags]) == 0
    by_old_name = capsys.readouterr()
    assert by_old_name.out == by_new_name.out
    assert f"{old} is now {new}; the old name works until the next release" in by_old_name.err
    assert old not in by_new_name.err


def test_default_of_a_list_in_the_help_is_accepted_on_the_command_line():
    assert parsed("--tasks", default_text(Recipe.tasks)).tasks == Recipe.tasks


@pytest.mark.parametrize(
    "kind",
    [
        DataRecipe,
        PretrainRecipe,
        SftRecipe,
        GrpoRecipe,
        MergeRecipe,
        CompressRecipe,
        DistillRecipe,
        EvaluateRecipe,
    ],
)
def test_new_names_of_renamed_keys_are_flags_and_old_ones_are_not(kind):
    """A rename to a key that does not exist would refuse the old name too."""
    flags = {kebab_case(flag) for flag in recipe_parser("stage", "A stage.", kind)._option_string_actions}
    for old, new in renamed_keys(kind).items():
        flag = kebab_case(
            f"--{new}"
        )  # a key of a dictionary (`grid.fractions.hidden_size`) has no flag of its own
        assert flag in flags or flag.rpartition(".")[0] in flags, (old, new)
        assert kebab_case(f"--{old}") not in flags, (old, new)


def test_post_training_gets_the_defaults_of_grpo_from_a_file_and_from_a_flag(tmp_path):
    """GRPO's learning rate is 1e-4; the optimizer's own default is 3e-3."""
    from nanohybrid.cli.compress import parser

    path = tmp_path / "r.toml"
    path.write_text("[[post_training]]\n[post_training.grpo]\nrollout_steps = 3\n")
    flags = [["--recipe", str(path)], ["--post-training", '[{"grpo": {"rollout_steps": 3}}]']]
    for given in flags:
        arguments = parser().parse_args(["MODEL", "--out", "x", *given])
        (entry,) = recipe_from(CompressRecipe, parser().instantiate(arguments)).post_training
        assert entry.grpo == GrpoRecipe(rollout_steps=3)
