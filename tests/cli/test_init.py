"""`nanohybrid init`: a whole directory of random weights, written as they are drawn."""

import json
import subprocess
import sys

import pytest
import torch

import nanohybrid
from nanohybrid.checkpoint import load
from nanohybrid.cli.main import main
from nanohybrid.engine import LLM, SamplingParams
from nanohybrid.engine.random_weights import random_model

PEAK = """
import sys
from nanohybrid.cli.main import main
from nanohybrid.checkpoint import CheckpointWriter  # and all that it imports

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

main(["init", "--preset", "tiny", "--out", sys.argv[1] + "/first"])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before = status("VmRSS")
assert main(["init", "--preset", "nano-291m", "--dtype", "bf16", "--out", sys.argv[1] + "/model"]) == 0
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("preset", ["tiny", "tiny-dense"])
def test_init_writes_the_weights_of_a_random_model(tmp_path, preset, capsys):
    assert (
        main(
            [
                "init",
                "--preset",
                preset,
                "--out",
                str(tmp_path / "a"),
                "--dtype",
                "bf16",
                "--seed",
                "3",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == {
        "out": str(tmp_path / "a"),
        "preset": preset,
        "dtype": "bfloat16",
    }
    found, want = load(tmp_path / "a"), random_model(nanohybrid.preset(preset), torch.bfloat16, seed=3)
    assert found.config.pattern == want.config.pattern
    for (name, one), (other, two) in zip(found.named_parameters(), want.named_parameters(), strict=True):
        assert name == other and torch.equal(one, two)
    assert (
        len(LLM(tmp_path / "a").generate(["hi"], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids)
        == 2
    )


def test_init_refuses_an_existing_directory(tmp_path, capsys):
    assert main(["init", "--preset", "tiny", "--out", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["init", "--preset", "tinny", "--out", str(tmp_path / "a")]) == 2
    assert "tinny" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_init_holds_one_weight_at_a_time_in_memory(tmp_path):
    """A 291M in bf16 is 555 MiB, its largest matrix 128, drawn anew for each."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.splitlines()[-1]) < 300
