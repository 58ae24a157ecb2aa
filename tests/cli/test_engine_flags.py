"""Renamed flags of the commands that run an engine: old names work for one release, with a warning each."""

import json

import pytest

from nanohybrid.cli import chat, generate, plan_serve, serve
from nanohybrid.cli.main import main

MODEL = {
    "--max-running": "--max-num-seqs",
    "--speculate": "--num-speculative-tokens",
    "--state-dtype": "--mamba-ssm-cache-dtype",
    "--kv-dtype": "--kv-cache-dtype",
}
CHAT = {**MODEL, "--context": "--max-model-len"}
del CHAT["--max-running"]  # a chat runs one sequence
CASES = [
    *((generate, ["--prompt", "hi"], old, new) for old, new in MODEL.items()),
    *((chat, [], old, new) for old, new in CHAT.items()),
    *((serve, [], old, new) for old, new in {**MODEL, **serve.RENAMED}.items()),
    *((plan_serve, ["--memory-gib", "2"], old, new) for old, new in {**MODEL, **plan_serve.RENAMED}.items()),
]
VALUES = {"--state-dtype": "fp16", "--kv-dtype": "fp8", "--cache-gib": "1.5"}


@pytest.mark.parametrize(
    ("command", "needed", "old", "new"),
    CASES,
    ids=[f"{case[0].__name__.rpartition('.')[2]}{case[2]}" for case in CASES],
)
def test_old_engine_flag_sets_the_new_one_and_warns_on_stderr(command, needed, old, new, capsys):
    value = VALUES.get(old, "3")
    parsed = [command.parser().parse_args([*needed, flag, value]) for flag in (old, new)]
    assert parsed[0] == parsed[1] and str(parsed[0][new[2:].replace("-", "_")]) == value
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and f"{old} is now {new}" in warnings[0]
    assert old not in command.parser().format_help().split()


def plan(capsys, *flags):
    assert main(["plan", "serve", "--preset", "nano-9b-v2", "--memory-gib", "22", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_serve_quantize_is_the_flag_of_serve_and_its_dtype_means_the_same(capsys):
    assert plan(capsys, "--quantize", "int4") == plan(capsys, "--dtype", "int4")
    assert plan(capsys, "--quantize", "int4")["weight_bytes"] < plan(capsys)["weight_bytes"] / 2


def test_plan_serve_refuses_two_formats(capsys):
    code = main(
        ["plan", "serve", "--preset", "tiny", "--memory-gib", "2", "--quantize", "int4", "--dtype", "int8"]
    )
    assert code == 2 and "--quantize int4 contradicts --dtype int8" in capsys.readouterr().err


def test_chat_has_no_flag_for_several_sequences(capsys):
    assert main(["chat", "DIR", "--max-num-seqs", "4"]) == 2
    assert "--max-num-seqs" in capsys.readouterr().err
