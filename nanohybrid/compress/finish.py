"""The last steps of a compression, where its recipe has them: quantized matrices, and a file for llama.cpp.

quantized/          the distilled (and aligned) checkpoint with quantized matrices (quantize/stage.py)
model-TYPE.gguf     the result for llama.cpp (nanohybrid/export)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanohybrid.checkpoint import load_config
from nanohybrid.compress.post_training import check_post_training
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
SAME_CODES = {"int8": "q8_0", "int4": "q4_0"}
"""Formats whose codes a GGUF of this type takes over without rounding again."""


def check_last_steps(recipe: CompressRecipe, model: Path, pretraining: Path | None, device: str) -> None:
    """Raise, before any work, the error that would stop a later step: InputError, or MissingExtraError for a
    package."""
    if recipe.problems:
        check_can_answer(recipe.tasks, model, device)
    if recipe.gguf is not None:
        with GgufExport(model, recipe.gguf):
            pass
    check_post_training(recipe.post_training, model, pretraining)
    check_shapes(recipe, load_config(model))


def check_shapes(recipe: CompressRecipe, base: HybridConfig) -> None:
    """Raise InputError where the grid has no shape for this model, or none that fits, or a loss names layers
    that do not exist.

    Which layers go is known only after importance is measured, so where all shapes of the grid lose some,
    nothing is said about what fits.
    """
    grid, count = recipe.grid_for(base), base.num_hidden_layers
    if max(grid.drop_layers) >= count:
        raise InputError(
            f"grid.drop_layers is {list(grid.drop_layers)}: the model has {count} layers; nearest {count - 1}"
        )
    again = [stage.distill for stage in recipe.post_training if stage.distill is not None]
    losses = [one.hidden_state_loss for one in (recipe.distill, *again) if one.hidden_state_loss.weight]
    unknown = [layer for loss in losses for layer in loss.layers if not 0 <= layer < count]
    if unknown:
        raise InputError(
            f"hidden_state_loss.layers names {unknown[0]}: the teacher has layers 0 to {count - 1}"
        )
    if max(grid.drop_layers) == 0:
        shapes = ((target, target.config(base, None)) for target in targets(base, grid))
        within(recipe.budget(base), base, shapes)


def quantized(recipe: CompressRecipe, model: Path, out: Path, data: Path, device: str) -> dict[str, Path]:
    """Quantize a checkpoint into `out`; returns it by its name among the steps, nothing where the recipe has
    no format."""
    if recipe.quantize is None:
        return {}
    how = QuantizeRecipe(
        recipe.quantize,
        recipe.quantize_head,
        num_calibration_samples=recipe.num_calibration_samples,
        max_calibration_length=recipe.max_calibration_length,
    )
    return {QUANTIZED: quantize_stage(how, model, out, data, device)}


def export_gguf(
    recipe: CompressRecipe, plain: Path, steps: Mapping[str, Path], directory: Path
) -> dict[str, Any]:
    """Write the result as a GGUF into `directory`. Returns its measures, empty where the recipe has no type.

    plain: the last checkpoint that was not quantized. The codes of the quantized one are taken over where the
    type has the same; any other type is made from `plain`, so that nothing is rounded twice.
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
