"""Every `nanohybrid COMMAND --flag` of the documents names a command and flags that exist; nothing is run."""

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from nanohybrid.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
SHELL = ("", "sh", "bash", "console")
INLINE = re.compile(r"`([^`\n]*\b(?:nanohybrid|run\.py) [^`\n]*)`")
CALL = re.compile(
    r"(?:^|.* )(?:(?P<run>python3? run\.py)|nanohybrid|python3? -m nanohybrid) (?P<arguments>.+)"
)
OF_RUN = ("setup", "test")  # run.py's own commands; it hands all others on


def calls(text):
    """(words, through run.py) of each call of ours in a shell text, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if "nanohybrid" not in line and "run.py" not in line:
            continue
        words = shlex.split(line, comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            found = CALL.fullmatch(part)
            if found:
                yield shlex.split(found["arguments"]), found["run"] is not None


def variants(words):
    """The calls that a usage line stands for: `[--flag N]` is given, of `a|b` each is taken once, and N is a
    number."""
    words = [
        word.removeprefix("[").removesuffix("]") if re.match(r"\[-|[^\[]*\]$", word) else word
        for word in words
    ]
    choices = [word.split("|") if "://" not in word else [word] for word in words]
    first = [one[0] for one in choices]
    every = [first] + [
        [*first[:at], other, *first[at + 1 :]] for at, one in enumerate(choices) for other in one[1:]
    ]
    return [["1" if re.fullmatch("[A-Z]", word) else word for word in one] for one in every]


def parse(words):
    """Parse a call with the command's own parser. Raises where it cannot be."""
    name, *rest = words
    assert name in COMMANDS, f"there is no command {name}"
    parser = importlib.import_module(COMMANDS[name].module).parser()
    parser.exit_on_error = False
    parser.parse_args(rest)


def flags_of(parser):
    """Every flag of a parser and of its subcommands."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action._name_parser_map.values():
                flags |= flags_of(inner)
    return flags


def block_calls():
    for page in PAGES:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            if block["language"] not in SHELL:
                continue
            before = {}  # what `...` stands for: the last call of the same command
            for words, through_run in calls(block["text"]):
                if "..." in words:
                    at = words.index("...")
                    words = [*words[:at], *before[words[0]], *words[at + 1 :]]
                else:
                    before[words[0]] = words[1:]
                if through_run and words == ["quickstart"]:
                    words = ["quickstart", "--out", "runs/quickstart"]
                if words[0] not in ("--help", "--version") and not (through_run and words[0] in OF_RUN):
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(block_calls()))
def test_a_command_in_a_block_is_understood_by_its_parser(words, monkeypatch, capsys):
    """Parsed with all values, in the repository's root, where the recipes lie; an old name would warn on
    stderr."""
    monkeypatch.chdir(ROOT)
    for variant in variants(words):
        try:
            parse(variant)
        except (argparse.ArgumentError, SystemExit) as error:
            pytest.fail(f"{' '.join(variant)}: {error}")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_the_text_and_its_flags_exist(page):
    for found in INLINE.findall(page.read_text()):
        for words, through_run in calls(found.replace("'", "")):
            name, *rest = words
            if name.isupper() or name.startswith("-") or (through_run and name in OF_RUN):
                continue  # a placeholder, --help, or run.py's own
            assert name in COMMANDS, found
            known = flags_of(importlib.import_module(COMMANDS[name].module).parser())
            given = re.findall(r"--[a-z][\w.-]*", " ".join(rest))
            assert [flag for flag in given if flag not in known] == [], found


def test_run_py_has_the_commands_that_are_left_out_here():
    text = (ROOT / "run.py").read_text()
    assert [name for name in OF_RUN if f'command == "{name}"' not in text] == []


def test_calls_are_found_and_wrong_ones_are_not_understood():
    """The tests above must not pass because nothing is found or everything is taken."""
    text = "a && nanohybrid chat DIR   # it's\npython3 run.py quickstart\npip install x\nnanohybrid \\\n  inspect PATH"  # noqa: E501
    assert list(calls(text)) == [
        (["chat", "DIR"], False),
        (["quickstart"], True),
        (["inspect", "PATH"], False),
    ]
    assert variants(["quantize", "P1", "--to", "int8|int4", "[--problems", "N]", "[--json]"]) == [
        ["quantize", "P1", "--to", one, "--problems", "1", "--json"] for one in ("int8", "int4")
    ]
    parse(["chat", "DIR", "--max-new-tokens", "5"])
    for wrong in (
        ["chat", "DIR", "--no-such-flag"],
        ["quantize", "DIR", "--out", "X", "--to", "int3"],
        ["inspect", "--context", "many"],
    ):
        with pytest.raises((argparse.ArgumentError, SystemExit)):
            parse(wrong)
    with pytest.raises(AssertionError):
        parse(["no-such-command"])
