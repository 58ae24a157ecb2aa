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
    ("tiny/compress", CompressRecipe), ("tiny/distill", DistillRecipe), ("tiny/evaluate", EvaluateRecipe),
    ("small/compress/compress", CompressRecipe), ("small/compress/align", CompressRecipe), ("nano-12b-v2/compress", CompressRecipe),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), RECIPES)
def test_a_recipe_is_read(name, kind):
    assert isinstance(load(kind, FOLDER / f"{name}.toml"), kind)


def test_the_12b_recipe_is_the_papers():
    recipe = load(CompressRecipe, FOLDER / "nano-12b-v2" / "compress.toml")
    parent = nanohybrid.preset("nano-12b-v2")
    assert recipe.budget(parent).bytes / 2**30 == pytest.approx(19.66, abs=0.005)
    assert 4480 / 5120 in recipe.grid_for(parent).of("hidden_size") and recipe.grid_for(
        parent
    ).drop_layers == (6, 8, 10)
    ends = [0.0, *(stretch.until for stretch in recipe.distill.stretches)]
    tokens = [round((end - start) * recipe.distill.tokens / 1e9) for start, end in pairwise(ends)]
    assert tokens == [50, 25, 1]
    assert [stage.kind for stage in recipe.after] == ["grpo", "distill", "grpo", "merge"]
