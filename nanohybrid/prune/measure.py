"""Measuring importance as a step of a stage: activations in one pass, layers by skipping them, kept in a file.

The file is found again by what it was measured on, so that a resumed or repeated command does not measure twice. A checkpoint is read
layer by layer; for the iterative ranking of layers, which reads it again for each of them that goes, only where it has no room whole.
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
from nanohybrid.prune.layerwise import Stored
from nanohybrid.prune.streaming import streams
from nanohybrid.stages import progress

ITERATIVE, ONE_SHOT, COSINE = "iterative", "one-shot", "cosine"


def importance_of(
    model: HybridLM | Path,
    calibration: Calibration,
    directory: Path,
    outgoing: bool,
    rounds: int | None,
    layers_by: str = ITERATIVE,
    stream: bool | None = None,
    device: str = "cpu",
) -> Importance:
    """Scores of `model`, read from `directory` where they were measured before, else measured and written there.

    model: in memory, or a checkpoint. rounds: how many layers may go; None leaves layers unranked. layers_by: how they are ranked:
    iteratively, each after the one before it is gone; one-shot, each alone; by cosine, which costs no further pass. stream: whether a
    checkpoint is read layer by layer to rank iteratively; None: where it has no room whole. device: where a checkpoint is measured.
    """
    if isinstance(model, HybridLM) and (found_format := format_in(model)) is not None:
        raise InputError(
            f"the model is quantized ({found_format}): take the checkpoint that it was made from"
        )
    if (directory / FILE).exists():
        found = Importance.load(directory / FILE)
        same = found.facts.get("calibration") == calibration.hash and found.facts.get("outgoing") == outgoing
        ranked = rounds is None or (
            found.facts.get("layers_by", ITERATIVE) == layers_by and found.facts.get("rounds", -1) >= rounds
        )
        if same and ranked:
            return found
    if isinstance(model, Path) and (
        rounds is None or layers_by != ITERATIVE or streams(model, stream, device)
    ):
        with CheckpointReader(model) as reader:
            scores = _scored(Stored(reader, device=device), calibration, outgoing, rounds, layers_by)
    else:
        loaded = load(model, torch.float32, device) if isinstance(model, Path) else model
        scores = _scored(loaded, calibration, outgoing, rounds, layers_by)
    scores.save(directory)
    return scores


def _scored(
    model: HybridLM | Stored, calibration: Calibration, outgoing: bool, rounds: int | None, layers_by: str
) -> Importance:
    with progress("importance", calibration.tokens * model.config.num_hidden_layers, "tok") as bar:
        scores = measure_activations(model, calibration, outgoing, advance=bar.advance)
    if rounds is None:
        return scores
    if layers_by == COSINE:
        return scores.with_layers(
            scores.cosine.clone(), scores.cosine.argsort(stable=True).tolist(), rounds, layers_by=layers_by
        )
    ranking = _ranked(model, calibration, rounds if layers_by == ITERATIVE else 0)
    return scores.with_layers(ranking.score_L, ranking.order, rounds, layers_by=layers_by)


def _ranked(model: HybridLM | Stored, calibration: Calibration, rounds: int) -> LayerRanking:
    """Layers by the change of the logits."""
    if isinstance(model, HybridLM):
        with progress("layers", max(1, rounds), "rounds") as bar:
            return rank_layers(model, calibration, rounds, advance=bar.advance)
    with progress(
        "layers", max(1, rounds) * calibration.tokens * model.config.num_hidden_layers, "tok"
    ) as bar:
        return rank_layers_streamed(model, calibration, rounds, advance=bar.advance)
