"""The recipes that come with the package are read by their commands."""

from pathlib import Path

import pytest

import nanohybrid
from nanohybrid.compress import CompressRecipe, DistillRecipe
from nanohybrid.evaluate import EvaluateRecipe
from nanohybrid.stages.recipe import load

FOLDER = Path(nanohybrid.__file__).parent / "recipes"
RECIPES = [
    ("tiny/compress", CompressRecipe), ("tiny/distill", DistillRecipe), ("tiny/evaluate", EvaluateRecipe),
    ("small/compress/compress", CompressRecipe),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), RECIPES)
def test_a_recipe_is_read(name, kind):
    assert isinstance(load(kind, FOLDER / f"{name}.toml"), kind)
