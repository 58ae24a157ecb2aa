"""The stage `prune`: a checkpoint in, a smaller one out, with `pruning_mask.json`, the entries that
remain."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from nanohybrid.checkpoint import CheckpointReader, load_config, refuse_quantized, resolve
from nanohybrid.checkpoint.config_fields import OWN
from nanohybrid.checkpoint.dialects import model_type
from nanohybrid.config import HybridConfig
from nanohybrid.data import TokenStore
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_units import AUTO, depth_units
from nanohybrid.prune.importance import Importance
from nanohybrid.prune.measure import ITERATIVE, PER_LAYER, DepthRanking, importance_of
from nanohybrid.prune.slicing import prune_checkpoint
from nanohybrid.prune.target import Target
from nanohybrid.stages import open_stage, progress


@dataclass(frozen=True)
class PruneRecipe:
    """What to prune a model to, and how importance is measured where no scores are given."""

    target: Target = field(default_factory=Target)
    scale_by_outgoing_norm: bool = True
    """Multiply activations by the norm of the weights that read them."""
    num_calibration_samples: int = 256
    """At most so many calibration documents."""
    max_calibration_length: int = 512
    """At most so many tokens of each."""
    depth_importance: str = ITERATIVE
    """How layers are ranked where their number is given: iterative (as in the paper), one-shot, or cosine.
    The last two read the checkpoint layer by layer."""
    depth_unit: str = AUTO
    """What goes as one: block (attention and MLP), layer, or auto: blocks where the model's type knows only
    blocks (llama, mistral, qwen3)."""
    depth_score: str = PER_LAYER
    """Rank by the change of the logits for each `layer`, or for each `parameter`, that goes."""
    depth_tokens: int | None = None
    """Calibration tokens of one round of the ranking. Not set: as many as take about a minute."""

    RENAMED: ClassVar[dict[str, str]] = {
        "outgoing": "scale_by_outgoing_norm",
        "samples": "num_calibration_samples",
        "length": "max_calibration_length",
        "layers_by": "depth_importance",
    }

    def __post_init__(self) -> None:
        _ = self.depth  # checks its names

    @property
    def depth(self) -> DepthRanking:
        """How layers are ranked."""
        return DepthRanking(self.depth_importance, self.depth_unit, self.depth_score, self.depth_tokens)


def prune(
    recipe: PruneRecipe,
    model: Path,
    out: Path,
    importance: Path | None = None,
    calibration: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Prune the checkpoint `model` into `out`. Returns `out`.

    importance: a file of scores; calibration: documents to measure scores on, with `device` as where; not
    both. Raises InputError, before anything is written, where the target is impossible or needs scores and
    there are none.
    """
    model = resolve(model)
    refuse_quantized(model)
    config = load_config(model)
    recipe.target.check(config)
    depth_units(config, recipe.depth_unit)  # refuses blocks where there are none
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
            scores = _measured(recipe, model, config, stage.directory / "importance", calibration, device)
        selection = recipe.target.select(config, scores)
        with CheckpointReader(model) as reader:
            tensors = len(reader.names())
        with progress("prune", tensors, "tensors") as bar:
            pruned = prune_checkpoint(model, selection, stage.directory, bar.advance)
        stage.measure(**sizes("parent", config), **sizes("pruned", pruned))
        warn_of_type(config, pruned)
    return out


def _measured(
    recipe: PruneRecipe, model: Path, config: HybridConfig, folder: Path, documents: Path, device: str
) -> Importance:
    """The scores of the checkpoint on documents, written to `folder`."""
    samples = Calibration.read(
        documents, model, recipe.num_calibration_samples, recipe.max_calibration_length
    )
    TokenStore.from_documents(samples.samples).check_ids(config.vocab_size, documents)
    layers = recipe.target.layers
    rounds = None if layers is None else config.num_hidden_layers - layers
    return importance_of(
        model,
        samples,
        folder,
        recipe.scale_by_outgoing_norm,
        rounds,
        recipe.depth,
        device=device,
    )


def warn_of_type(config: HybridConfig, pruned: HybridConfig) -> None:
    """Say on stderr where a model that other programs read has become one that they do not."""
    before, after = model_type(config), model_type(pruned)
    if after == OWN and before != OWN:
        print(
            f"nanohybrid: warning: the result is of the type {OWN}, which no other program reads; a {before} "
            "model that loses whole blocks (attention and MLP) stays one",
            file=sys.stderr,
        )


def sizes(name: str, config: HybridConfig) -> dict[str, object]:
    """A model's parameters and pattern, as measures under this name."""
    return {f"{name}_parameters": Footprint.of(config).parameters, f"{name}_pattern": config.pattern}
