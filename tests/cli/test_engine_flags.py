"""Renamed flags of the commands that run an engine: old names work for one release, with a warning each."""

import pytest

from nanohybrid.cli import chat, generate, plan_serve, serve

MODEL = {
    "--max-running": "--max-num-seqs",
    "--speculate": "--num-speculative-tokens",
    "--state-dtype": "--mamba-ssm-cache-dtype",
    "--kv-dtype": "--kv-cache-dtype",
}
CASES = [
    *((generate, ["--prompt", "hi"], old, new) for old, new in MODEL.items()),
    *((chat, [], old, new) for old, new in {**MODEL, "--context": "--max-model-len"}.items()),
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
