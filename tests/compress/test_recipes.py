"""The recipes that come with the package are read by their commands."""

from itertools import pairwise
from pathlib import Path

import pytest

import nanohybrid
from nanohybrid.compress import CompressRecipe, DistillRecipe
from nanohybrid.evaluate import EvaluateRecipe
from nanohybrid.stages.recipe import load

FOLDER = Path(nanohybrid.__file__).parent / "recipes"
RECIPES = [
    ("tiny/compress", CompressRecipe),
    ("tiny/distill", DistillRecipe),
    ("tiny/evaluate", EvaluateRecipe),
    ("small/compress/compress", CompressRecipe),
    ("small/compress/align", CompressRecipe),
    ("nano-12b-v2/compress", CompressRecipe),
]


@pytest.mark.parametrize(("name", "kind"), RECIPES)
def test_recipes_of_the_package_are_read(name, kind):
    assert isinstance(load(kind, FOLDER / f"{name}.toml"), kind)


def test_12b_recipe_has_the_numbers_of_the_paper():
    recipe = load(CompressRecipe, FOLDER / "nano-12b-v2" / "compress.toml")
    parent = nanohybrid.preset("nano-12b-v2")
    assert recipe.budget(parent).bytes / 2**30 == pytest.approx(19.66, abs=0.005)
    assert 4480 / 5120 in recipe.grid_for(parent).of("hidden_size") and recipe.grid_for(
        parent
    ).drop_layers == (6, 8, 10)
    ends = [0.0, *(step.until for step in recipe.distill.sequence_length_schedule)]
    tokens = [round((end - start) * recipe.distill.tokens / 1e9) for start, end in pairwise(ends)]
    assert tokens == [50, 25, 1]
    assert [stage.kind for stage in recipe.post_training] == ["grpo", "distill", "grpo", "merge"]
