"""Measuring importance as a step of a stage: activations in one pass, layers by skipping them, kept in a file.

The file is found again by what it was measured on, so that a resumed or repeated command does not measure twice. A checkpoint is read
layer by layer; only the ranking of layers, which runs the model once for each of them, has the whole of it in memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nanohybrid.checkpoint import CheckpointReader, load
from nanohybrid.compress.activations import measure_activations
from nanohybrid.compress.calibration import Calibration
from nanohybrid.compress.importance import FILE, Importance
from nanohybrid.compress.layers import rank_layers
from nanohybrid.compress.parts import Stored
from nanohybrid.errors import InputError
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import format_in
from nanohybrid.stages import progress

ITERATIVE, ONE_SHOT, COSINE = "iterative", "one-shot", "cosine"


def importance_of(
    model: HybridLM | Path, calibration: Calibration, directory: Path, outgoing: bool, rounds: int | None, layers_by: str = ITERATIVE
) -> Importance:
    """Scores of `model`, read from `directory` where they were measured before, else measured and written there.

    model: in memory, or a checkpoint. rounds: how many layers may go; None leaves layers unranked. layers_by: how they are ranked:
    iteratively, each after the one before it is gone; one-shot, each alone; by cosine, which costs no further pass and so never needs
    the whole model in memory.
    """
    if isinstance(model, HybridLM) and (found_format := format_in(model)) is not None:
        raise InputError(f"the model is quantised ({found_format}): take the checkpoint that it was made from")
    by_cosine = rounds is not None and layers_by == COSINE
    passes = None if rounds is None or by_cosine else rounds if layers_by == ITERATIVE else 0
    if (directory / FILE).exists():
        found = Importance.load(directory / FILE)
        same = found.facts.get("calibration") == calibration.hash and found.facts.get("outgoing") == outgoing
        ranked = rounds is None or (found.facts.get("layers_by", ITERATIVE) == layers_by and found.facts.get("rounds", -1) >= rounds)
        if same and ranked:
            return found
    if isinstance(model, Path) and passes is None:
        with CheckpointReader(model) as reader:
            scores = _activations(Stored(reader), calibration, outgoing)
    else:
        loaded = load(model, dtype=torch.float32) if isinstance(model, Path) else model
        scores = _activations(loaded, calibration, outgoing)
        if passes is not None and rounds is not None:
            with progress("layers", max(1, passes), "rounds") as bar:
                ranking = rank_layers(loaded, calibration, passes, advance=bar.advance)
            scores = scores.with_layers(ranking.score_L, ranking.order, rounds, layers_by=layers_by)
    if by_cosine and rounds is not None:
        order = scores.cosine.argsort(stable=True).tolist()
        scores = scores.with_layers(scores.cosine.clone(), order, rounds, layers_by=layers_by)
    scores.save(directory)
    return scores


def _activations(model: HybridLM | Stored, calibration: Calibration, outgoing: bool) -> Importance:
    with progress("importance", calibration.tokens * model.config.num_hidden_layers, "tok") as bar:
        return measure_activations(model, calibration, outgoing, advance=bar.advance)
