"""The profile of a decode step: its parts add up to the step, in time and in bytes."""

import json
import sys
from pathlib import Path

import pytest

from nanohybrid.ops.numba import available

pytestmark = pytest.mark.skipif(not available(), reason="numba is not installed")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import decode_profile

    class Machine:
        def __init__(self, device):
            pass

        def rates(self, looks, of):
            return 1e9, 1e12

    monkeypatch.setattr(decode_profile, "Machine", Machine)
    return decode_profile


def test_decode_profile_parts_add_up_to_the_step_and_its_bytes(script, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "decode_profile.py",
            "--preset",
            "tiny",
            "--dtype",
            "int8",
            "--prompt-tokens",
            "9",
            "--steps",
            "9",
            "--json",
        ],
    )
    assert script.main() == 0
    found = json.loads(capsys.readouterr().out)["int8"]
    parts = {name: (megabytes, ms) for name, megabytes, _, ms in found["parts"]}
    assert {"norms", "Mamba-2 in", "attention", "MLP down", "head", "sampling", "waiting", "wake"} <= set(
        parts
    )
    moved = 1e6 * sum(megabytes for megabytes, _ in parts.values())
    assert 0.9 < moved / found["step_bytes"] < 1.1  # norms and biases are not counted, nor all padding
    assert (
        0.3 < sum(ms for _, ms in parts.values()) / found["step_ms"] < 3
    )  # medians of each, on a machine that may be busy
    assert all(ms > 0 for name, (_, ms) in parts.items() if name not in ("waiting", "wake"))


def test_decode_profile_table_has_a_row_for_each_part_with_its_roofline(script):
    found = {
        "stream_gb_per_second": 10.0,
        "step_ms": 2.0,
        "roofline_ms": 1.0,
        "step_bytes": 10_000_000,
        "parts": [("head", 5.0, 0.5, 0.8)],
    }
    assert "| head | 5.0 | 0.500 | 0.800 | 40.0 % |" in script.as_table("bf16", found)
