"""`nanohybrid plan train`: the same numbers for people and machines, and one line for what cannot be."""

import json

import pytest

from nanohybrid.cli.main import main


def test_the_plan_is_printed_for_machines(capsys):
    assert main(["plan", "train", "--preset", "tiny", "--batch-tokens", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"] == found["gradient_bytes"] == found["moment_bytes"] / 2
    assert found["peak_bytes"] > found["weight_bytes"] * 4 + found["kept_bytes"] / 2


def test_layers_made_again_need_less(capsys):
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
                    "--checkpoint-every",
                    every,
                    "--json",
                ]
            )
            == 0
        )
        peaks.append(json.loads(capsys.readouterr().out)["peak_bytes"])
    assert peaks[1] < 0.8 * peaks[0]


def test_people_get_a_table(capsys):
    assert main(["plan", "train", "--preset", "tiny"]) == 0
    assert "activations of 2,048 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flag, value", [("--batch-tokens", "0"), ("--checkpoint-every", "-1")])
def test_sizes_that_are_none_end_with_one_line(flag, value, capsys):
    assert main(["plan", "train", "--preset", "tiny", flag, value]) == 2
    assert f"{flag} is {value}" in capsys.readouterr().err
