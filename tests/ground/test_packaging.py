"""The files around the package agree with it: locks with requirements, the site's reference with the public
names."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nanohybrid

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(*names: str) -> dict[str, str]:
    """Version of each package that the lock files pin, by its normalized name."""
    lines = [line for name in names for line in (ROOT / "requirements" / name).read_text().splitlines()]
    found = [line.split("==") for line in lines if not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def requirements(lines: list[str]) -> list[Requirement]:
    """The requirements of `lines`, with those of an extra of nanohybrid in its place."""
    found = []
    for one in map(Requirement, lines):
        if one.name != "nanohybrid":
            found.append(one)
        for extra in sorted(one.extras) if one.name == "nanohybrid" else []:
            found += requirements(PYPROJECT["project"]["optional-dependencies"][extra])
    return found


def unmet(lines: list[str], locked: dict[str, str]) -> list[str]:
    """The requirements that the locked versions do not satisfy."""
    wanted = [one for one in requirements(lines) if one.marker is None or one.marker.evaluate()]
    return [str(one) for one in wanted if not one.specifier.contains(locked.get(one.name.lower(), "0"))]


def test_dev_lock_satisfies_every_requirement():
    lines = PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]
    assert unmet(lines, pins("torch.lock", "dev.lock")) == []


def test_docs_lock_satisfies_the_docs_group_and_agrees_with_dev_lock():
    docs, dev = pins("docs.lock"), pins("dev.lock")
    assert unmet(PYPROJECT["dependency-groups"]["docs"], docs) == []
    assert {name: docs[name] for name in docs.keys() & dev} == {name: dev[name] for name in docs.keys() & dev}


@pytest.mark.parametrize("name", nanohybrid.__all__)
def test_api_reference_documents_every_public_name(name):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert f"::: nanohybrid.{name}\n" in pages
