"""Measuring importance as a step of a stage: activations in one pass, layers by skipping them, stored in a
file.

The file is found again by what it was measured on, so a resumed or repeated command does not measure twice. A
checkpoint is read layer by layer. Only the iterative ranking of layers, which reads it once for each layer
that goes, loads it where it fits the memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nanohybrid.checkpoint import CheckpointReader, load
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import format_in
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.depth_importance import LayerRanking, rank_layers, rank_layers_streamed
from nanohybrid.prune.importance import FILE, Importance
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.prune.streaming import should_stream
from nanohybrid.stages import progress

ITERATIVE, ONE_SHOT, COSINE = "iterative", "one-shot", "cosine"
DEPTH_IMPORTANCE = (ITERATIVE, ONE_SHOT, COSINE)


def importance_of(
    model: HybridLM | Path,
    calibration: Calibration,
    directory: Path,
    scale_by_outgoing_norm: bool,
    rounds: int | None,
    depth_importance: str = ITERATIVE,
    stream: bool | None = None,
    device: str = "cpu",
) -> Importance:
    """The scores of `model`, read from `directory` where they were measured before, else measured and written
    there.

    model: in memory, or a checkpoint directory. scale_by_outgoing_norm: as in activations.py. rounds: how
    many layers may go; None leaves layers unranked. depth_importance: how layers are ranked: iterative (each
    after the one before it was removed), one-shot (each alone), or cosine (no further pass). stream: whether
    a checkpoint is read layer by layer to rank iteratively; None: where it does not fit the memory. device:
    where a checkpoint is measured.

    Raises InputError for a quantized model.
    """
    if isinstance(model, HybridLM) and (found_format := format_in(model)) is not None:
        raise InputError(
            f"the model is quantized ({found_format}): take the checkpoint that it was made from"
        )
    if (directory / FILE).exists():
        found = Importance.load(directory / FILE)
        same = (
            found.facts.get("calibration") == calibration.hash
            and found.facts.get("scale_by_outgoing_norm") == scale_by_outgoing_norm
        )
        ranked = rounds is None or (
            found.facts.get("depth_importance", ITERATIVE) == depth_importance
            and found.facts.get("rounds", -1) >= rounds
        )
        if same and ranked:
            return found
    how = calibration, scale_by_outgoing_norm, rounds, depth_importance
    if isinstance(model, Path) and (
        rounds is None or depth_importance != ITERATIVE or should_stream(model, stream, device)
    ):
        with CheckpointReader(model) as reader:
            scores = _measure(StreamedModel(reader, device=device), *how)
    else:
        scores = _measure(load(model, torch.float32, device) if isinstance(model, Path) else model, *how)
    scores.save(directory)
    return scores


def _measure(
    model: HybridLM | StreamedModel,
    calibration: Calibration,
    scale_by_outgoing_norm: bool,
    rounds: int | None,
    depth_importance: str,
) -> Importance:
    with progress("importance", calibration.tokens * model.config.num_hidden_layers, "tok") as bar:
        scores = measure_activations(model, calibration, scale_by_outgoing_norm, advance=bar.advance)
    if rounds is None:
        return scores
    if depth_importance == COSINE:
        order = scores.cosine.argsort(stable=True).tolist()
        return scores.with_layers(scores.cosine.clone(), order, rounds, depth_importance=depth_importance)
    ranking = _rank(model, calibration, rounds if depth_importance == ITERATIVE else 0)
    return scores.with_layers(ranking.score_L, ranking.order, rounds, depth_importance=depth_importance)


def _rank(model: HybridLM | StreamedModel, calibration: Calibration, rounds: int) -> LayerRanking:
    """Layers by the change of the logits."""
    if isinstance(model, HybridLM):
        with progress("layers", max(1, rounds), "rounds") as bar:
            return rank_layers(model, calibration, rounds, advance=bar.advance)
    work = max(1, rounds) * calibration.tokens * model.config.num_hidden_layers
    with progress("layers", work, "tok") as bar:
        return rank_layers_streamed(model, calibration, rounds, advance=bar.advance)
