"""The documents agree with the repository: links and file names exist, the index has every page, the layers
are the linter's."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NO_FILES = {"utils.py"}  # named as what not to write


@cache
def python_files():
    """Every Python file of the repository, as `/path`."""
    folders = ("nanohybrid", "tests", "benchmarks", "examples", "docs")
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.py")] + [*ROOT.glob("*.py")]
    return [f"/{file.relative_to(ROOT).as_posix()}" for file in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_file_that_a_page_names_exists(page):
    """A name is a path from the root, from the package, or the end of one (`sse.py` on the page of the
    server)."""
    named = set(re.findall(r"`([a-z_][a-z0-9_./-]*\.py)`", page.read_text()))
    assert {
        name for name in named if not any(path.endswith(f"/{name}") for path in python_files())
    } <= NO_FILES


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [
        page.name
        for page in (ROOT / "docs").glob("*.md")
        if page.name != "index.md" and f"({page.name})" not in index
    ] == []


def test_the_layers_of_architecture_md_are_those_that_the_linter_checks():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    checked = [set(re.findall(r"\w+", layer)) - {"__main__"} for layer in layers]
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in rows] == [layer for layer in checked if layer]


def test_the_readme_names_every_command():
    from nanohybrid.cli.main import COMMANDS

    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`{name}" not in readme] == []
