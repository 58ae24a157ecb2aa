"""Measuring importance as a step of a stage: activations in one pass, layers by skipping them, kept in a file.

The file is found again by what it was measured on, so that a resumed or repeated command does not measure twice.
"""

from __future__ import annotations

from pathlib import Path

from nanohybrid.compress.activations import measure_activations
from nanohybrid.compress.calibration import Calibration
from nanohybrid.compress.importance import FILE, Importance
from nanohybrid.compress.layers import rank_layers
from nanohybrid.model import HybridLM
from nanohybrid.stages import progress


def importance_of(model: HybridLM, calibration: Calibration, directory: Path, outgoing: bool, rounds: int | None) -> Importance:
    """Scores of `model`, read from `directory` where they were measured before, else measured and written there.

    rounds: how many places of the ranking of layers are found iteratively; None leaves layers unranked.
    """
    if (directory / FILE).exists():
        found = Importance.load(directory / FILE)
        same = found.facts.get("calibration") == calibration.hash and found.facts.get("outgoing") == outgoing
        if same and (rounds is None or found.facts.get("rounds", -1) >= rounds):
            return found
    with progress("importance", calibration.tokens, "tok") as bar:
        scores = measure_activations(model, calibration, outgoing, advance=bar.advance)
    if rounds is not None:
        with progress("layers", max(1, rounds), "rounds") as bar:
            ranking = rank_layers(model, calibration, rounds, advance=bar.advance)
        scores = scores.with_layers(ranking.score_L, ranking.order, rounds)
    scores.save(directory)
    return scores
