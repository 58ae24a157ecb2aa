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


def importance_of(model: HybridLM | Path, calibration: Calibration, directory: Path, outgoing: bool, rounds: int | None) -> Importance:
    """Scores of `model`, read from `directory` where they were measured before, else measured and written there.

    model: in memory, or a checkpoint. rounds: how many places of the ranking of layers are found iteratively; None leaves layers
    unranked.
    """
    if isinstance(model, HybridLM) and (found_format := format_in(model)) is not None:
        raise InputError(f"the model is quantised ({found_format}): take the checkpoint that it was made from")
    if (directory / FILE).exists():
        found = Importance.load(directory / FILE)
        same = found.facts.get("calibration") == calibration.hash and found.facts.get("outgoing") == outgoing
        if same and (rounds is None or found.facts.get("rounds", -1) >= rounds):
            return found
    if isinstance(model, Path) and rounds is None:
        with CheckpointReader(model) as reader:
            scores = _activations(Stored(reader), calibration, outgoing)
    else:
        loaded = load(model, dtype=torch.float32) if isinstance(model, Path) else model
        scores = _activations(loaded, calibration, outgoing)
        if rounds is not None:
            with progress("layers", max(1, rounds), "rounds") as bar:
                ranking = rank_layers(loaded, calibration, rounds, advance=bar.advance)
            scores = scores.with_layers(ranking.score_L, ranking.order, rounds)
    scores.save(directory)
    return scores


def _activations(model: HybridLM | Stored, calibration: Calibration, outgoing: bool) -> Importance:
    with progress("importance", calibration.tokens * model.config.num_hidden_layers, "tok") as bar:
        return measure_activations(model, calibration, outgoing, advance=bar.advance)
