"""`nanohybrid plan train`: table, JSON, and errors in one line."""

import json

import pytest

from nanohybrid.cli.main import main


def test_plan_train_prints_json(capsys):
    assert main(["plan", "train", "--preset", "tiny", "--batch-tokens", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"] == found["gradient_bytes"] == found["moment_bytes"] / 2
    assert found["peak_bytes"] > found["weight_bytes"] * 4 + found["kept_bytes"] / 2


def test_plan_train_with_activation_checkpointing_needs_less_memory(capsys):
    peaks = []
    for every in ("0", "1"):
        assert (
            main(
                [
                    "plan",
                    "train",
                    "--preset",
                    "nano-291m",
                    "--batch-tokens",
                    "8192",
                    "--activation-checkpoint-every",
                    every,
                    "--json",
                ]
            )
            == 0
        )
        peaks.append(json.loads(capsys.readouterr().out)["peak_bytes"])
    assert peaks[1] < 0.8 * peaks[0]


def test_plan_train_prints_a_table(capsys):
    assert main(["plan", "train", "--preset", "tiny"]) == 0
    assert "activations of 2,048 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flag, value", [("--batch-tokens", "0"), ("--activation-checkpoint-every", "-1")])
def test_plan_train_refuses_bad_sizes_in_one_line(flag, value, capsys):
    assert main(["plan", "train", "--preset", "tiny", flag, value]) == 2
    assert f"{flag} is {value}" in capsys.readouterr().err
