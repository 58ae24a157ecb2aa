"""Every example runs as its head says, is short, and is named in the README of the examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "add_a_mixer": "saved, loaded, generated, verified",
    "add_a_task": "random weights solve",
    "chat": "finished by",
    "compress_to_a_budget": "bytes of the budget",
    "serve_with_tools": "the model calls add(",
    "train_a_tiny_model": "right:",
}
"""What each one's output must contain."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_as_its_head_says(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_states_its_command(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert re.search(rf"python examples/{path.name}", text)


def test_every_example_has_an_expectation():
    assert {path.stem for path in EXAMPLES} == set(SAYS)
