"""What comes last where a compression's recipe asks for it: matrices in 8 or 4 bits, a file for llama.cpp.

quantized/          the distilled (and aligned) checkpoint with its matrices as codes (quantize_stage.py)
model-TYPE.gguf     the result for llama.cpp (nanohybrid/export)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint import load_config
from nanohybrid.compress.post_training import check_after
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import targets
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate.budget import within
from nanohybrid.evaluate.accuracy import check_can_answer
from nanohybrid.export import GgufExport
from nanohybrid.quantize.stage import QuantizeRecipe, quantize_stage
from nanohybrid.stages import progress

QUANTIZED = "quantized"
SAME_CODES = {"int8": "q8_0", "int4": "q4_0"}  # whose values a GGUF takes over as they are


def check_ends(recipe: CompressRecipe, model: Path, pretraining: Path | None, device: str) -> None:
    """Raise, before any work, what would stop the later steps: InputError, or MissingExtra for a package that is not there."""
    if recipe.problems:
        check_can_answer(recipe.tasks, model, device)
    if recipe.gguf is not None:
        with GgufExport(model, recipe.gguf):
            pass
    check_after(recipe.after, model, pretraining)
    check_shapes(recipe, load_config(model))


def check_shapes(recipe: CompressRecipe, parent: HybridConfig) -> None:
    """Raise InputError where the grid has no shape for this parent, or none that fits, or the loss names layers that it does not have.

    Which layers go is only known by importance, so where all shapes of the grid lose some, what fits is not.
    """
    grid, count = recipe.grid_for(parent), parent.num_hidden_layers
    if max(grid.drop_layers) >= count:
        raise InputError(
            f"grid.drop_layers is {list(grid.drop_layers)}: the model has {count} layers; nearest {count - 1}"
        )
    lessons = [recipe.distill, *(after.distill for after in recipe.after if after.distill is not None)]
    strangers = [
        layer
        for lesson in lessons
        for layer in lesson.between.layers
        if lesson.between.weight and not 0 <= layer < count
    ]
    if strangers:
        raise InputError(f"between.layers names {strangers[0]}: the teacher has layers 0 to {count - 1}")
    if max(grid.drop_layers) == 0:
        within(
            recipe.budget(parent),
            parent,
            ((target, target.config(parent, None)) for target in targets(parent, grid)),
        )


def quantized(recipe: CompressRecipe, model: Path, out: Path, data: Path, device: str) -> dict[str, Path]:
    """A checkpoint quantized into `out`, by its name among the steps; nothing where the recipe has no format."""
    if recipe.quantize is None:
        return {}
    how = QuantizeRecipe(recipe.quantize, recipe.samples, recipe.length)
    return {QUANTIZED: quantize_stage(how, model, out, data, device)}


def export_gguf(
    recipe: CompressRecipe, plain: Path, steps: Mapping[str, Path], directory: Path
) -> dict[str, Any]:
    """Write the result as a GGUF into `directory`; what is remembered of it. Nothing where the recipe has no type.

    The codes of the quantized checkpoint are taken over where both mean the same; any other type is made from `plain`, the last that was
    not quantized, so that nothing is rounded twice.
    """
    if recipe.gguf is None:
        return {}
    source = steps[QUANTIZED] if SAME_CODES.get(recipe.quantize or "") == recipe.gguf else plain
    file = directory / f"model-{recipe.gguf}.gguf"
    with GgufExport(source, recipe.gguf) as export:
        with progress("export", export.bytes, "B") as bar:
            export.write(file, bar.advance)
    return {
        "gguf": {"file": file.name, "type": recipe.gguf, "bytes": file.stat().st_size, "from": source.name}
    }
