"""The stage `prune`: a checkpoint in, a smaller one out, with `pruning_mask.json`, the entries that remain."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nanohybrid.checkpoint import CheckpointReader, load_config, refuse_quantized
from nanohybrid.config import HybridConfig
from nanohybrid.data import TokenStore
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.measure import ITERATIVE, importance_of
from nanohybrid.prune.slicing import prune_checkpoint
from nanohybrid.prune.target import Target
from nanohybrid.stages import open_stage, progress


@dataclass(frozen=True)
class PruneRecipe:
    """What to prune a model to, and how its importance is measured where that is not given."""

    target: Target = field(default_factory=Target)
    outgoing: bool = True
    """Multiply activations by the norm of the weights that read them."""
    samples: int = 256
    """Calibration documents."""
    length: int = 512
    """Tokens of each, at most."""
    layers_by: str = ITERATIVE
    """How layers are ranked where their number is given: iterative (the paper's), one-shot, or cosine; the last two stream."""


def prune(
    recipe: PruneRecipe,
    model: Path,
    out: Path,
    importance: Path | None = None,
    calibration: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Prune the checkpoint `model` into `out`, by scores from a file or measured on `calibration` documents, on a device."""
    refuse_quantized(model)
    config = load_config(model)
    recipe.target.check(config)
    if importance is not None and calibration is not None:
        raise InputError("--importance and --calibration contradict each other: give one of the two")
    given = {"importance": importance, "calibration": calibration}
    inputs = {"model": model, **{name: path for name, path in given.items() if path is not None}}
    scores = None if importance is None else Importance.load(importance)
    if scores is None and calibration is None:
        recipe.target.select(config, None)  # refuses a target that needs scores
    with open_stage(out, "prune", recipe, inputs, device=device) as stage:
        if stage.complete:
            return out
        if calibration is not None and recipe.target.needs_scores:
            samples = Calibration.read(calibration, model, recipe.samples, recipe.length)
            TokenStore.from_documents(samples.samples).check_ids(config.vocab_size, calibration)
            rounds = None if recipe.target.layers is None else config.num_hidden_layers - recipe.target.layers
            folder = stage.directory / "importance"
            scores = importance_of(
                model, samples, folder, recipe.outgoing, rounds, recipe.layers_by, device=device
            )
        selection = recipe.target.select(config, scores)
        with CheckpointReader(model) as reader:
            tensors = len(reader.names())
        with progress("prune", tensors, "tensors") as bar:
            pruned = prune_checkpoint(model, selection, stage.directory, bar.advance)
        stage.measure(**sizes("parent", config), **sizes("pruned", pruned))
    return out


def sizes(name: str, config: HybridConfig) -> dict[str, object]:
    """A model's parameters and pattern, as measures."""
    return {f"{name}_parameters": Footprint.of(config).parameters, f"{name}_pattern": config.pattern}
