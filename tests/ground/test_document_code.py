"""The Python of the documents runs: all blocks of a page in order, in one namespace, on tiny models of random
weights."""

import contextlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from nanohybrid import HybridConfig, save
from nanohybrid.data.build import build
from nanohybrid.data.mixture import Phase
from nanohybrid.data.recipe import DataRecipe, TaskSource
from nanohybrid.engine.random_weights import random_model, stand_in_tokenizer
from nanohybrid.text import ChatTemplate

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->\s*\Z")
MOST_NOT_RUN = 3

# what the pages name, and the tests put there
CHECKPOINTS = ("runs/quickstart/4-compress", "Nemotron-Nano-9B-v2")
CORPUS, TEXTS = "runs/data", "my/texts"
SERVER = "http://127.0.0.1:8000"
CONFIG = HybridConfig(
    pattern="M-*M-", vocab_size=269, hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=32, n_groups=2, ssm_state_size=16,
    initializer_range=0.3,
)  # fmt: skip


def blocks(page):
    """(first line, code, reason not to run it or None) of each block of Python."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        marked = NOT_RUN.search(text[: found.start()])
        code = "".join(line.removeprefix(found["indent"]) for line in found["code"].splitlines(keepends=True))
        yield text.count("\n", 0, found.start("code")) + 1, code, marked and marked["reason"]


def source(page):
    """The code of a page on the lines where it stands, so that a traceback names them."""
    lines = [""] * (page.read_text().count("\n") + 1)
    for first, code, reason in blocks(page):
        if reason is None:
            lines[first - 1 : first - 1 + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A tiny checkpoint with tokenizer and template, and a corpus of a few problems."""
    folder = tmp_path_factory.mktemp("examples")
    save(random_model(CONFIG, torch.float32, seed=5), folder / "checkpoint")
    stand_in_tokenizer(CONFIG).save(folder / "checkpoint")
    ChatTemplate.default().save(folder / "checkpoint")
    recipe = DataRecipe(
        vocab_size=300, code_megabytes=0.02, prose_megabytes=0.02, tasks=(TaskSource("running", 100),),
        near_duplicate_threshold=0, phases=(Phase(1.0, {"code": 1, "prose": 1, "tasks": 1}),),
    )  # fmt: skip
    build(recipe, folder / "corpus")
    return folder


@pytest.fixture
def place(examples, tmp_path, monkeypatch):
    """A working directory in which the paths of the pages lead somewhere."""
    for path in CHECKPOINTS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(examples / "checkpoint")
    (tmp_path / CORPUS).symlink_to(examples / "corpus")
    (tmp_path / TEXTS).mkdir(parents=True)
    (tmp_path / TEXTS / "a.txt").write_text("three words here\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def server():
    """Starts a server when it is first asked for; the address."""
    spec = importlib.util.spec_from_file_location("serving", ROOT / "tests" / "serve" / "serving.py")
    with contextlib.ExitStack() as opened:

        def address():
            serving = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(serving)
            return opened.enter_context(serving.started()).url

        yield address


@pytest.mark.parametrize("page", [page for page in PAGES if source(page).strip()], ids=lambda page: page.name)
def test_every_python_block_of_a_page_runs(page, place, server, monkeypatch):
    text = source(page)
    if SERVER in text:
        text = text.replace(SERVER, server())
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look for their module
    exec(compile(text, str(page), "exec"), module.__dict__)


def test_few_python_blocks_are_not_run_and_each_says_why():
    marked = [(f"{page.name}:{line}", reason) for page in PAGES for line, _, reason in blocks(page) if reason]
    assert len(marked) <= MOST_NOT_RUN, marked


def test_blocks_are_found_at_their_lines_and_marks_only_directly_above(tmp_path):
    """The test above must not pass because nothing is found."""
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```python\ny = 1\n```\n\n"
        "<!-- not run: far away -->\nwords\n\n- item\n    ```python\n    z = x\n    ```\n```sh\nls\n```\n"
    )
    assert [(line, code) for line, code, reason in blocks(page) if reason is None] == [
        (3, "x = 1\n"),
        (15, "z = x\n"),
    ]
    assert [reason for _, _, reason in blocks(page) if reason] == ["needs a GPU"]
    assert source(page).splitlines()[2] == "x = 1" and source(page).splitlines()[14] == "z = x"
